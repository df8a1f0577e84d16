"""Records: what remains of a finished run in results/runs/, one JSON file named like its run directory.

A record holds the run's identity and hash, its environment, its result, and its metrics.csv as columns.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lawn.config import Config, config_hash, identity, run_name
from lawn.errors import RunError
from lawn.files import write_text
from lawn.train.record import RunDirectory

RECORDS = Path(__file__).resolve().parents[1] / "results" / "runs"


@dataclass(frozen=True)
class Record:
    name: str
    hash: str
    config: dict[str, Any]
    environment: dict[str, Any]
    result: dict[str, Any]
    history: pd.DataFrame  # a row for each epoch, the columns of metrics.csv


def write(config: Config, folder: Path = RECORDS) -> Path:
    """Record the finished run of `config`. Raises RunError when it has not finished."""
    directory = RunDirectory(config)
    if not directory.done:
        raise RunError(f"{directory.path}: not finished, so it cannot be recorded")
    history = pd.read_csv(directory.path / "metrics.csv")
    environment = json.loads((directory.path / "env.json").read_text())
    environment.pop("command", None)  # folders of this machine, and nothing that the config does not say
    content = {
        "hash": directory.hash,
        "config": identity(config),
        "environment": environment,
        "result": directory.result(),
        "history": {column: [_short(v) for v in history[column]] for column in history},
    }
    path = folder / f"{run_name(config)}.json"
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    write_text(path, "{\n" + lines + "\n}\n")
    return path


def read(config: Config, folder: Path = RECORDS) -> Record | None:
    """The record of `config`, None where there is none. Raises RunError when it is not what its name says."""
    path = folder / f"{run_name(config)}.json"
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        record = Record(
            name=path.stem,
            hash=content["hash"],
            config=content["config"],
            environment=content["environment"],
            result=content["result"],
            history=pd.DataFrame(content["history"]),
        )
    except (ValueError, KeyError) as error:
        raise RunError(f"{path}: damaged record ({error})") from error
    if record.hash != config_hash(config) or record.config != identity(config):
        raise RunError(f"{path}: its config is not the one that its name stands for; delete it and run again")
    return record


def read_all(configs: Iterable[Config], folder: Path = RECORDS) -> list[Record]:
    """The records there are, in the order of `configs`."""
    return [record for config in configs if (record := read(config, folder)) is not None]


def _short(value: float) -> float | int | None:
    """Six significant digits are enough for a figure; an empty field is None."""
    if pd.isna(value):
        return None
    return int(value) if float(value).is_integer() else float(f"{value:.6g}")
