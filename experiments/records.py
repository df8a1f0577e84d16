"""Records: what remains of a finished run in results/runs/, one JSON file named like its run directory.

A record holds the run's identity and hash, the command that gives the same run, its environment, its result (with what
came out for each evaluation sample), and its metrics.csv as columns. Records of the runs that chose hyperparameters lie
in the folder tuning/ below, without the last two.
"""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lawn.config import Config, identity, identity_hash, run_name
from lawn.errors import RunError
from lawn.files import write_text
from lawn.train.record import RunDirectory, unpacked


@dataclass(frozen=True)
class Record:
    path: Path
    hash: str
    config: dict[str, Any]
    environment: dict[str, Any]
    result: dict[str, Any]
    history: pd.DataFrame  # a row for each epoch, the columns of metrics.csv

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def diverged(self) -> bool:
        return bool(self.result["status"] == "diverged")

    def value(self, key: str) -> float:
        """A field of the last epoch, `headline` the metric that the task is known by; NaN where it is undefined, as all
        are if the run diverged."""
        name = f"{self.result['split']}_{self.result['headline']}" if key == "headline" else key
        value = None if self.diverged else self.result["last"][name]
        return nan if value is None else float(value)

    @property
    def outcomes(self) -> NDArray[np.int64] | None:
        """Of each evaluation sample, as `Task.outcomes` has it [samples]; None in records of before they were kept."""
        text = self.result.get("outcomes")
        return None if text is None else unpacked(text)

    @property
    def code(self) -> str:
        """The version of the code that it was run with; several where it went on with another."""
        return " then ".join(dict.fromkeys(map(_version, self.environments)))

    @property
    def environments(self) -> list[dict[str, Any]]:
        """Where the run was started, and where it went on."""
        return [self.environment, *self.environment.get("resumed", [])]


class Store:
    """The records below a folder. What is read is kept, since files of finished runs do not change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[str, Record] = {}

    def any_of(self, dataset: str) -> bool:
        """Whether a run on this dataset has been recorded."""
        return any(self.folder.glob(f"**/{dataset}-*.json"))

    def has(self, config: Config) -> bool:
        return self._path(config) is not None

    def read(self, config: Config) -> Record | None:
        """The record of `config`, None where there is none. Raises RunError when it is not what its name says."""
        name = run_name(config)
        if name not in self._read:
            path = self._path(config)
            if path is None:
                return None
            self._read[name] = read_record(path)
        return self._read[name]

    def all(self) -> Iterator[Record]:
        """Every record there is."""
        for path in sorted(self.folder.glob("**/[!.]*.json")):
            yield read_record(path)

    def write(self, config: Config, overrides: tuple[str, ...], tuning: bool) -> Record:
        """Record the finished run of `config`. Raises RunError when it has not finished."""
        directory = RunDirectory(config)
        if not directory.done:
            raise RunError(f"{directory.path}: not finished, so it cannot be recorded")
        environment = json.loads((directory.path / "env.json").read_text())
        for start in (environment, *environment.get("resumed", [])):
            start.pop("command", None)  # folders of this machine, and nothing that the overrides do not say
        content = {
            "hash": directory.hash,
            "command": f"python run.py {shlex.join(overrides)}",
            "config": identity(config),
            "environment": environment,
            "result": directory.result(),
        }
        if tuning:
            content["result"].pop("outcomes", None)
        else:
            try:
                history = pd.read_csv(directory.path / "metrics.csv")
            except (OSError, ValueError) as error:
                raise RunError(f"{directory.path / 'metrics.csv'}: cannot be read ({error})") from error
            content["history"] = {column: [_short(v) for v in history[column]] for column in history}
        path = self.folder / ("tuning" if tuning else "") / f"{run_name(config)}.json"
        return save(path, content)

    def _path(self, config: Config) -> Path | None:
        name = f"{run_name(config)}.json"
        return next((path for path in (self.folder / name, self.folder / "tuning" / name) if path.exists()), None)


def save(path: Path, content: dict[str, Any]) -> Record:
    """Write a record, a line for each of its parts."""
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    write_text(path, "{\n" + lines + "\n}\n")
    return read_record(path)


def read_record(path: Path) -> Record:
    """Raises RunError when it is damaged, or not what its name says."""
    try:
        content = json.loads(path.read_text())
        if not identity_hash(content["config"]) == content["hash"] == path.stem.rpartition("-")[2]:
            raise RunError(f"{path}: its config is not the one that its name stands for; delete it and run again")
        return Record(
            path=path,
            hash=content["hash"],
            config=content["config"],
            environment=content["environment"],
            result=content["result"],
            history=pd.DataFrame(content.get("history", {})),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: damaged record ({error})") from error


def _version(environment: dict[str, Any]) -> str:
    return (environment["git"] or "no git")[:10] + (" with uncommitted changes" if environment["dirty"] else "")


def _short(value: float) -> float | int | None:
    """Six significant digits are enough for a figure; an empty field is None."""
    if pd.isna(value):
        return None
    return int(value) if float(value).is_integer() else float(f"{value:.6g}")
