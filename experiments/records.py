"""Records of finished runs: the lines of results/runs/EXPERIMENT.jsonl, named like their run directories.

A record has the run's identity and hash, the command that repeats it, its environment, its result (with the outcome
of each evaluation sample) and the columns of metrics.csv, thinned to about EPOCHS epochs. Records of tuning runs are
in results/tuning/, those on the validation split without outcomes and metrics. Lines are appended while runs end, and
sorted by name at the end.
"""

import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import ceil, nan
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments.json_lines import JsonLines, decode, read_bytes
from lawn.config import Config
from lawn.diagnostics.figure import read_metrics
from lawn.errors import WRITTEN_AGAIN, RunError
from lawn.files import write_text
from lawn.identity import identity, identity_hash, run_name
from lawn.train.run_directory import RunDirectory, decode_outcomes, read_environment

DAMAGE = (ArithmeticError, AttributeError, KeyError, TypeError, ValueError)  # raised by reading a damaged record
EPOCHS = 50  # in a record, about, if every epoch measures the same
OF_ALL = ("code",)  # properties that every record must have
OF_A_RUN = (*OF_ALL, "headline", "seconds_per_epoch", "hardware", "machines", "packages", "warnings")


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

    @property
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
        return [self.environment, *self.environment.get("resumed", [])]


class Store:
    """The records in results/, by the names of their runs.

    Records that were read are cached, because finished runs do not change; records that other processes add are seen.
    """

    def __init__(self, results: Path) -> None:
        self.runs, self.tuning = results / "runs", results / "tuning"
        self._read: dict[str, Record] = {}
        self._files: dict[Path, JsonLines] = {}
        self._kinds: set[tuple[str, ...]] = set()

    def kinds(self) -> frozenset[tuple[str, ...]]:
        """The dataset, optimizer, batch size and number of epochs of each recorded run, as texts."""
        self._refresh()
        return frozenset(self._kinds)

    def has(self, name: str) -> bool:
        return self.read(name) is not None

    def read(self, name: str) -> Record | None:
        """The record of a run; None without one. Raises RunError for a damaged record in any file."""
        if name not in self._read:
            self._refresh()
        return self._read.get(name)

    def all(self) -> Iterator[Record]:
        """All records, sorted by name."""
        self._refresh()
        yield from (self._read[name] for name in sorted(self._read))

    def write(self, config: Config, overrides: tuple[str, ...], experiment: str, tunes: bool = False) -> Record:
        """Record a finished run of an experiment, or one that tunes it.

        Raises RunError if the run has not finished.
        """
        directory = RunDirectory(config)
        if not directory.done:
            raise RunError(f"{directory.path}: not finished, so it cannot be recorded")
        environment, result = read_environment(directory.path), directory.result()
        for start in (environment, *environment.get("resumed", [])):
            start.pop("command", None)  # has the folders of this machine
        name = run_name(config)
        content = {
            "name": name,
            "hash": directory.hash,
            "command": f"python run.py {shlex.join(overrides)}",
            "config": identity(config),
            "environment": environment,
            "result": result,
        }
        if tunes and config.eval.split == "val":  # a run on the test split may be a final one too
            result.pop("outcomes", None)
        else:
            content["history"] = _history(directory.path, _recorded(config, result["last"]["epoch"]))
        folder, known = self.tuning if tunes else self.runs, self.read(name)
        path = folder / f"{experiment}.jsonl"
        if known is not None and known.path.parent == folder:  # by the command of another experiment, meanwhile
            path = known.path
        file = self._file(path)
        line = json.dumps(content)
        with file.locked(self._taker(file)):
            if name in self._read and self._read[name].path == file.path:
                others = [other for other in file.lines() if json.loads(other)["name"] != name]
                file.replace([*others, line])
            else:
                file.append(line)
        return self._read[name]

    def sort(self) -> None:
        """Sort the files by name, in which two histories of them are easily merged."""
        for path in self._paths():
            file = self._file(path)
            with file.locked(self._taker(file)):
                by_name = {json.loads(line)["name"]: line for line in file.lines()}
                file.replace([by_name[name] for name in sorted(by_name)])

    def _paths(self) -> Iterator[Path]:
        """The files of records. Raises RunError if their folder cannot be read, or has records that cannot."""
        for folder in (self.tuning, self.runs):  # of a run that is in both, the record with its outcomes counts
            try:
                names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
            except FileNotFoundError:
                continue
            except OSError as error:  # otherwise it would look as if nothing had been run
                raise RunError(f"{folder}: cannot be read as a folder; choose another with --results") from error
            for name in names:
                if name.endswith(".json"):
                    raise RunError(
                        f"{folder / name}: a record in a file of its own, as earlier versions wrote it; move it to a "
                        f'line of EXPERIMENT.jsonl there, beginning with {{"name": "{name.removesuffix(".json")}", ...'
                    )
            yield from (folder / name for name in names if name.endswith(".jsonl"))

    def _file(self, path: Path) -> JsonLines:
        return self._files.setdefault(path, JsonLines(path))

    def _taker(self, file: JsonLines) -> Callable[[int, str], None]:
        """Caches the record of a line of a file."""

        def take(number: int, line: str) -> None:
            try:
                content = json.loads(line)
                record = _record(file.path, content.pop("name"), content, OF_A_RUN)
                dataset, optim, train = (record.config[section] for section in ("dataset", "optim", "train"))
                kind = dataset["name"], optim["name"], str(train["batch_size"]), str(train["epochs"])
            except DAMAGE as error:
                raise RunError(
                    f"{file.path}, line {number}: damaged record ({error}); delete the line and run again"
                ) from error
            self._read[record.name] = record
            self._kinds.add(kind)

        return take

    def _refresh(self) -> None:
        """Read what the files have got since. Raises RunError with the number of a damaged line."""
        for path in self._paths():
            file = self._file(path)
            file.read_new(self._taker(file))


def _history(run: Path, epochs: list[int]) -> dict[str, list[float | int | None]]:
    """The columns of metrics.csv for these epochs. Raises RunError if it does not have a row for each to the last."""
    history = read_metrics(run)
    if len(history) != epochs[-1]:
        raise RunError(f"{run / 'metrics.csv'}: has {len(history)} of {epochs[-1]} epochs; {WRITTEN_AGAIN}")
    return {str(column): [_short(history[column][epoch - 1]) for epoch in epochs] for column in history}


def _recorded(config: Config, epochs: int) -> list[int]:
    """The epochs that the record of a run of so many has.

    Of more than EPOCHS it is every second, third, ... and the last, unless some epochs measure what others do not.
    """
    alike = config.eval.every == 1 and config.diagnostics.name == "off"
    return sorted({*range(1, epochs + 1, ceil(epochs / EPOCHS) if alike else 1), epochs})


def save(path: Path, content: dict[str, Any]) -> Record:
    """Write a record with one line for each of its parts."""
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    write_text(path, "{\n" + lines + "\n}\n")
    return read_record(path)


def _record(path: Path, name: str, content: dict[str, Any], needed: tuple[str, ...] = OF_ALL) -> Record:
    """Raises one of DAMAGE if the content does not match the name or lacks a `needed` property."""
    if not identity_hash(content["config"]) == content["hash"] == name.rpartition("-")[2]:
        raise ValueError("its config does not match its name")
    if len(set(map(len, content.get("history", {}).values()))) > 1:
        raise ValueError("its history has columns of several lengths")
    record = Record(
        path=path,
        name=name,
        hash=content["hash"],
        config=content["config"],
        environment=content["environment"],
        result=content["result"],
        columns=content.get("history", {}),
        command=str(content["command"]),
    )
    for part in needed:
        getattr(record, part)
    return record


def read_record(path: Path, needed: tuple[str, ...] = OF_ALL) -> Record:
    """Read a record. Raises RunError if it is damaged or does not match its name."""
    try:
        return _record(path, path.stem, json.loads(decode(path, read_bytes(path))), needed)
    except DAMAGE as error:
        raise RunError(f"{path}: damaged record ({error}); delete it and run again") from error


def _version(environment: dict[str, Any]) -> str:
    return (environment["git"] or "no git")[:10] + (" with uncommitted changes" if environment["dirty"] else "")


def _short(value: float) -> float | int | None:
    """The value with six significant digits, enough for a figure; None for an empty field."""
    if pd.isna(value):
        return None
    return int(value) if float(value).is_integer() else float(f"{value:.6g}")
