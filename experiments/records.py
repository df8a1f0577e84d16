"""Records: what remains of a finished run in results/runs/, one JSON file named like its run directory.

A record holds the run's identity and hash, the command that gives the same run, its environment, its result (with what
came out for each evaluation sample), and its metrics.csv as columns. Records of the runs that chose an experiment's
hyperparameters are lines of results/tuning/EXPERIMENT.jsonl, in the order of their names, without the last two.
"""

import json
import os
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lawn.config import Config, identity, identity_hash, run_name
from lawn.diagnostics.figure import read_metrics
from lawn.errors import WRITTEN_AGAIN, RunError
from lawn.files import locked, write_text
from lawn.train.run_directory import RunDirectory, read_environment, unpacked

DAMAGE = (ArithmeticError, AttributeError, KeyError, TypeError, ValueError)  # what reading a damaged record raises
OF_ALL = ("code",)  # properties that a record has to have
OF_A_RUN = (*OF_ALL, "headline", "seconds_per_epoch")


@dataclass(frozen=True)
class Record:
    path: Path  # of the file that it lies in
    name: str  # of its run
    hash: str
    config: dict[str, Any]
    environment: dict[str, Any]
    result: dict[str, Any]
    history: pd.DataFrame  # a row for each epoch, the columns of metrics.csv

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
    def headline(self) -> float:
        """The metric that the task is known by, at the last epoch, in percent; NaN if the run diverged."""
        return self.value("headline")

    @property
    def seconds_per_epoch(self) -> float:
        return float(sum(self.result["seconds"].values()) / self.result["last"]["epoch"])

    @property
    def outcomes(self) -> NDArray[np.int64] | None:
        """Of each evaluation sample, as `Task.outcomes` has it [samples]; None in records of before they were kept."""
        text = self.result.get("outcomes")
        return None if text is None else unpacked(text)

    @property
    def scores(self) -> NDArray[np.float64] | None:
        """What each evaluation sample adds to the headline metric, which is the mean of these, in percent [samples]."""
        outcomes, headline = self.outcomes, self.result["headline"]
        if outcomes is None:
            return None
        right = outcomes < int(headline.removeprefix("hr")) if headline.startswith("hr") else outcomes
        return 100.0 * right.astype(np.float64)

    @property
    def code(self) -> str:
        """The version of the code that it was run with; several where it went on with another."""
        return " then ".join(dict.fromkeys(map(_version, self.environments)))

    @property
    def environments(self) -> list[dict[str, Any]]:
        """Where the run was started, and where it went on."""
        return [self.environment, *self.environment.get("resumed", [])]


class Store:
    """The records below results/, by the names of their runs. What is read is kept, since finished runs do not change;
    what others add meanwhile is seen.
    """

    def __init__(self, results: Path) -> None:
        self.runs, self.tuning = results / "runs", results / "tuning"
        self._read: dict[str, Record] = {}
        self._seen: dict[Path, tuple[int, int]] = {}  # the tuning files that have been read, with time and size

    def any_of(self, dataset: str) -> bool:
        """Whether a run on this dataset has been recorded."""
        self._refresh()
        return any(self.runs.glob(f"{dataset}-*.json")) or any(name.startswith(f"{dataset}-") for name in self._read)

    def has(self, name: str) -> bool:
        return self.read(name) is not None

    def read(self, name: str) -> Record | None:
        """The record of a run, None where there is none. Raises RunError when it is not what its name says."""
        if name not in self._read:
            self._refresh()
            path = self.runs / f"{name}.json"
            if path.exists():
                self._read[name] = read_record(path, OF_A_RUN)
        return self._read.get(name)

    def all(self) -> Iterator[Record]:
        """Every record there is."""
        self._refresh()
        for path in sorted(self.runs.glob("[!.]*.json")):
            self.read(path.stem)
        yield from (self._read[name] for name in sorted(self._read))

    def write(self, config: Config, overrides: tuple[str, ...], tunes: str | None = None) -> Record:
        """Record the finished run of `config`, among those that tune the experiment `tunes` if it does. Raises RunError
        when it has not finished."""
        directory = RunDirectory(config)
        if not directory.done:
            raise RunError(f"{directory.path}: not finished, so it cannot be recorded")
        environment, result = read_environment(directory.path), directory.result()
        for start in (environment, *environment.get("resumed", [])):
            start.pop("command", None)  # folders of this machine, and nothing that the overrides do not say
        content = {
            "hash": directory.hash,
            "command": f"python run.py {shlex.join(overrides)}",
            "config": identity(config),
            "environment": environment,
            "result": result,
        }
        name = run_name(config)
        if tunes is not None:
            result.pop("outcomes", None)
            path = self.tuning / f"{tunes}.jsonl"
            _insert(path, name, content)
            self._read[name] = _record(path, name, content)
            return self._read[name]
        history = read_metrics(directory.path)
        if len(history) != (epochs := result["last"]["epoch"]):
            raise RunError(f"{directory.path / 'metrics.csv'}: has {len(history)} of {epochs} epochs; {WRITTEN_AGAIN}")
        content["history"] = {column: [_short(v) for v in history[column]] for column in history}
        self._read[name] = save(self.runs / f"{name}.json", content)
        return self._read[name]

    def _refresh(self) -> None:
        """Read the tuning files that have changed."""
        for folder in (self.runs, self.tuning):  # else it would seem that nothing has been run
            if folder.exists() and not (folder.is_dir() and os.access(folder, os.R_OK | os.X_OK)):
                raise RunError(f"{folder}: is no folder that can be read; make it one, or give other --results")
        for path in self.tuning.glob("[!.]*.jsonl"):
            try:
                stat = path.stat()
            except OSError as error:
                raise RunError(f"{path}: cannot be read ({error.strerror}); put it back, or delete it") from error
            now = stat.st_mtime_ns, stat.st_size
            if self._seen.get(path) != now:
                self._read |= _lines(path)
                self._seen[path] = now


def _lines(path: Path) -> dict[str, Record]:
    """Raises RunError with the number of a line that is damaged, or not what its name says."""
    found = {}
    for number, line in enumerate(_text(path).splitlines(), start=1):
        try:
            content = json.loads(line)
            record = _record(path, content.pop("name"), content, OF_A_RUN)
        except DAMAGE as error:
            raise RunError(f"{path}, line {number}: damaged record ({error}); delete the line and run again") from error
        found[record.name] = record
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text("utf8")
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({error}); put it back, or delete it and run again") from error


def _insert(path: Path, name: str, content: dict[str, Any]) -> None:
    """Add a line to a tuning file, or replace the one of that name; others that do so wait."""
    while True:
        with locked(path.with_name(f".{path.name}.lock")) as held:
            if held:
                lines = _text(path).splitlines() if path.exists() else []
                try:
                    by_name = {json.loads(line)["name"]: line for line in lines}
                except (ValueError, KeyError, TypeError):
                    _lines(path)  # names the line
                    raise
                by_name[name] = json.dumps({"name": name, **content})
                write_text(path, "".join(f"{by_name[key]}\n" for key in sorted(by_name)))
                return
        time.sleep(0.01)


def save(path: Path, content: dict[str, Any]) -> Record:
    """Write a record, a line for each of its parts."""
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    write_text(path, "{\n" + lines + "\n}\n")
    return read_record(path)


def _record(path: Path, name: str, content: dict[str, Any], needed: tuple[str, ...] = OF_ALL) -> Record:
    """Raises one of DAMAGE when the content is not what its name says, or lacks a part of a `needed` property."""
    if not identity_hash(content["config"]) == content["hash"] == name.rpartition("-")[2]:
        raise ValueError("its config is not the one that its name stands for")
    record = Record(
        path=path,
        name=name,
        hash=content["hash"],
        config=content["config"],
        environment=content["environment"],
        result=content["result"],
        history=pd.DataFrame(content.get("history", {})),
    )
    for part in needed:
        getattr(record, part)
    return record


def read_record(path: Path, needed: tuple[str, ...] = OF_ALL) -> Record:
    """Raises RunError when it is damaged, or not what its name says."""
    try:
        return _record(path, path.stem, json.loads(_text(path)), needed)
    except DAMAGE as error:
        raise RunError(f"{path}: damaged record ({error}); delete it and run again") from error


def _version(environment: dict[str, Any]) -> str:
    return (environment["git"] or "no git")[:10] + (" with uncommitted changes" if environment["dirty"] else "")


def _short(value: float) -> float | int | None:
    """Six significant digits are enough for a figure; an empty field is None."""
    if pd.isna(value):
        return None
    return int(value) if float(value).is_integer() else float(f"{value:.6g}")
