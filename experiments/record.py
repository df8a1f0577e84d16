"""The record of a finished run, or of a simulation, and what pages take from it."""

import json
from dataclasses import dataclass
from functools import cached_property
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments.json_lines import decode, read_bytes
from lawn.errors import RunError
from lawn.files import write_text
from lawn.identity import identity_hash, name_prefix
from lawn.train.run_directory import decode_outcomes, environments

DAMAGE = (ArithmeticError, AttributeError, KeyError, TypeError, ValueError)  # raised by reading a damaged record
OF_ALL = ("code",)  # properties that every record must have
OF_A_RUN = (
    *OF_ALL,
    "kind",
    "headline",
    "seconds_per_epoch",
    "hardware",
    "machines",
    "packages",
    "warnings",
    "data",
    "scores",
)


@dataclass(frozen=True)
class Record:
    path: Path  # of its file
    name: str  # of its run
    hash: str
    config: dict[str, Any]
    environment: dict[str, Any]
    result: dict[str, Any]
    columns: dict[str, list[Any]]  # of metrics.csv, with a value for each recorded epoch
    command: str = ""  # that repeats the run
    line: int = 0  # of its file

    @property
    def file(self) -> str:
        """Its file, from the folder of results."""
        return f"{self.path.parent.name}/{self.path.name}"

    @cached_property
    def history(self) -> pd.DataFrame:
        """metrics.csv, a row for each recorded epoch."""
        return pd.DataFrame(self.columns)

    @property
    def link(self) -> str:
        """The target of a Markdown link: its file, with its name as the title."""
        return f'{self.file} "{self.name}"'

    @cached_property
    def kind(self) -> tuple[str, str, str, str]:
        """The dataset, optimizer, batch size and number of epochs."""
        dataset, optim, train = (self.config[section] for section in ("dataset", "optim", "train"))
        return dataset["name"], optim["name"], str(train["batch_size"]), str(train["epochs"])

    @property
    def diverged(self) -> bool:
        return bool(self.result["status"] == "diverged")

    def value(self, key: str) -> float:
        """A field of the last epoch; `headline` is the task's headline metric. NaN if undefined or diverged.

        Raises RunError for a field that the record does not have.
        """
        if key == "headline":
            return self.headline
        if not self.diverged and key not in self.result["last"]:
            raise self._lacks(key)
        return self._last(key)

    def column(self, key: str) -> list[Any]:
        """A column of metrics.csv, with a value for each recorded epoch. Raises RunError if the record has none."""
        if key not in self.columns:
            raise self._lacks(f"column {key}")
        return self.columns[key]

    def _lacks(self, what: str) -> RunError:
        return RunError(f"{self.path}: the record of {self.name} has no {what}; delete its line and run again")

    def _last(self, key: str) -> float:
        value = None if self.diverged else self.result["last"][key]
        return nan if value is None else float(value)

    @property
    def headline(self) -> float:
        """The task's headline metric at the last epoch, in percent; NaN if the run diverged."""
        return self._last(f"{self.result['split']}_{self.result['headline']}")

    @property
    def warnings(self) -> list[str]:
        return list(self.result["warnings"])

    @property
    def seconds_per_epoch(self) -> float:
        return float(sum(self.result["seconds"].values()) / self.result["last"]["epoch"])

    @property
    def hardware(self) -> str:
        """The name of the GPU or CPU that the run was started on."""
        device = str(self.environment["device"])
        return str(self.environment["cpu"]) if device == "cpu" else device

    @property
    def machines(self) -> list[str]:
        """The GPUs, or the CPUs with their number of cores, that the run was started and resumed on."""
        found = self.environments
        return [str(e["device"]) if e["device"] != "cpu" else f"{e['cores']}-core {e['cpu']}" for e in found]

    @property
    def packages(self) -> list[str]:
        """The names and versions of the packages that the run was started and resumed with."""
        return [f"{name} {version}" for e in self.environments for name, version in e["packages"].items()]

    @cached_property
    def outcomes(self) -> NDArray[np.int64] | None:
        """The outcome of each evaluation sample, see `Task.outcomes` [samples]; None in older records."""
        text = self.result.get("outcomes")
        return None if text is None else decode_outcomes(text)

    @property
    def scores(self) -> NDArray[np.float64] | None:
        """The score of each evaluation sample, in percent [samples]; their mean is the headline metric."""
        outcomes, headline = self.outcomes, self.result["headline"]
        if outcomes is None:
            return None
        right = outcomes < int(headline.removeprefix("hr")) if headline.startswith("hr") else outcomes
        return 100.0 * right.astype(np.float64)

    @property
    def code(self) -> str:
        """The version of the code; several if the run was resumed with another version."""
        return " then ".join(dict.fromkeys(map(_version, self.environments)))

    @property
    def data(self) -> dict[str, Any]:
        """The fingerprint of the data that the run has read; empty in older records."""
        return dict(self.environments[-1].get("data") or {})

    @property
    def environments(self) -> list[dict[str, Any]]:
        """The environments in which the run was started and resumed."""
        return environments(self.environment)


def numbers(result: dict[str, Any]) -> str:
    """What a result says of the last epoch, to compare."""
    return json.dumps([result["status"], result["last"]], sort_keys=True)


def check_run(record: Record) -> None:
    """Raises ValueError if the record of a run contradicts itself."""
    config, result = record.config, record.result
    if record.name != f"{name_prefix(config)}-{record.hash}":
        raise ValueError("its config does not match its name")
    if result["status"] not in ("done", "diverged"):
        raise ValueError(f"its status is {result['status']!r}, neither done nor diverged")
    if result["split"] != config["eval"]["split"]:
        raise ValueError(f"its result is of the {result['split']} split, its config of {config['eval']['split']}")
    epochs = config["train"]["epochs"]
    if not record.diverged and result["last"]["epoch"] != epochs:
        raise ValueError(f"its result is of epoch {result['last']['epoch']}, its config of {epochs}")


def check_same(known: Record, record: Record) -> None:
    """Raises RunError for two records of one run with different results."""
    if known is not record and numbers(known.result) != numbers(record.result):
        raise RunError(
            f"{record.path}, line {record.line}: another result of {record.name} than in {known.path}; delete one line"
        )


def record_of(path: Path, name: str, content: dict[str, Any], needed: tuple[str, ...], line: int = 0) -> Record:
    """Raises one of DAMAGE if the content does not match the name or lacks a `needed` property."""
    if not identity_hash(content["config"]) == content["hash"] == name.rpartition("-")[2]:
        raise ValueError("its config does not match its name")
    if len(set(map(len, content.get("history", {}).values()))) > 1:
        raise ValueError("its history has columns of several lengths")
    for values in (content["result"].get("last", {}).values(), *content.get("history", {}).values()):
        if not all(value is None or type(value) in (int, float) for value in values):
            raise ValueError("it has text, or a list, in the place of a number")
    record = Record(
        path=path,
        name=name,
        hash=content["hash"],
        config=content["config"],
        environment=content["environment"],
        result=content["result"],
        columns=content.get("history", {}),
        command=str(content["command"]),
        line=line,
    )
    for part in needed:
        getattr(record, part)
    return record


def read_record(path: Path) -> Record:
    """Read a record. Raises RunError if it is damaged or does not match its name."""
    try:
        return record_of(path, path.stem, json.loads(decode(path, read_bytes(path))), OF_ALL)
    except DAMAGE as error:
        raise RunError(f"{path}: damaged record ({error}); delete it and run again") from error


def save(path: Path, content: dict[str, Any]) -> Record:
    """Write a record with one line for each of its parts."""
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    write_text(path, "{\n" + lines + "\n}\n")
    return read_record(path)


def _version(environment: dict[str, Any]) -> str:
    return (environment["git"] or "no git")[:10] + (" with uncommitted changes" if environment["dirty"] else "")
