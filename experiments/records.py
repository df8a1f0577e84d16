"""Records of finished runs: the lines of results/runs/EXPERIMENT.jsonl, named like their run directories.

A record has the run's identity and hash, the command that repeats it, its environment, its result (with the outcome
of each evaluation sample; numbers have the nine significant digits of float32) and the columns of metrics.csv, thinned
to about EPOCHS epochs, with six digits. Records of tuning runs are in results/tuning/, those on the validation split
without outcomes and metrics. Lines are appended while runs end, and sorted by name at the end.
"""

import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import ceil
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.json_lines import JsonLines
from experiments.record import DAMAGE, OF_A_RUN, Record, check_run, check_same, numbers, record_of
from lawn.config import Config
from lawn.diagnostics.figure import read_metrics
from lawn.errors import RunError
from lawn.identity import identity, run_name
from lawn.output import echo
from lawn.train.run_directory import RunDirectory, environments, read_environment

EPOCHS = 30  # in a record, about, if every epoch measures the same


class RecordFile(JsonLines):
    """A file of records, and those that were read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.records: dict[str, Record] = {}  # by the names of their runs

    def take(self, lines: list[tuple[int, str]]) -> None:
        """Raises RunError with the number of a damaged line, or of one with another result of a run."""
        records = dict(self.records)
        for number, line in lines:
            try:
                content = json.loads(line)
                record = record_of(self.path, content.pop("name"), content, OF_A_RUN, number)
                check_run(record)
            except DAMAGE as error:
                raise RunError(
                    f"{self.path}, line {number}: damaged record ({error}); delete the line and run again"
                ) from error
            check_same(records.setdefault(record.name, record), record)
        self.records = records

    def forget(self) -> None:
        self.records = {}


class Store:
    """The records in results/, by the names of their runs.

    Records that were read are cached, because finished runs do not change; records that other processes add are seen.
    A store is for one thread.
    """

    def __init__(self, results: Path) -> None:
        self.runs, self.tuning = results / "runs", results / "tuning"
        self._files: dict[Path, RecordFile] = {}
        self._read: dict[str, Record] = {}  # of all files
        self._stamp: list[tuple[str, int, int, int]] = []  # of the files as they were read
        self._held = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """In the body, records that other processes add are not seen, so that all of it is of the same records."""
        self._refresh()
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def kinds(self) -> frozenset[tuple[str, ...]]:
        """The dataset, optimizer, batch size and number of epochs of each recorded run, as texts."""
        return frozenset(record.kind for record in self.all())

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
        read = self._read
        yield from (read[name] for name in sorted(read))

    def write(self, config: Config, overrides: tuple[str, ...], experiment: str, tunes: bool = False) -> Record:
        """Record a finished run of an experiment, or one that tunes it; a record that it has already is kept.

        Raises RunError if the run has not finished.
        """
        directory = RunDirectory(config)
        if not directory.done:
            raise RunError(f"{directory.path}: not finished, so it cannot be recorded")
        environment, result = read_environment(directory.path), _rounded(directory.result())
        for start in environments(environment):
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
        folder = self.tuning if tunes else self.runs
        self._refresh()
        file = self._file(folder / f"{experiment}.jsonl")
        with file.locked():
            known = self._merged().get(name)
            differs = known is not None and numbers(known.result) != numbers(result)
            if known is None or (known.path.parent == self.tuning != folder and not differs):
                file.append(json.dumps(content, separators=(",", ":")))
            elif differs:
                echo(f"warning: {name}: {known.path} has another result of it, which is kept", sys.stderr)
        self._read = self._merged()
        return self._read[name]

    def sort(self) -> None:
        """Sort the files by name, in which two histories of them are easily merged; not those of other users."""
        self._refresh()
        for file in self._files.values():
            with suppress(PermissionError), file.locked():
                by_name: dict[str, str] = {}
                for line in file.lines():
                    by_name.setdefault(json.loads(line)["name"], line)
                file.replace([by_name[name] for name in sorted(by_name)])

    def _paths(self) -> Iterator[Path]:
        """The files of records. Raises RunError if their folder cannot be read."""
        for folder in (self.tuning, self.runs):
            try:
                names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
            except FileNotFoundError:
                continue
            except OSError as error:  # otherwise it would look as if nothing had been run
                raise RunError(f"{folder}: cannot be read as a folder; choose another with --results") from error
            yield from (folder / name for name in names if name.endswith(".jsonl"))

    def _file(self, path: Path) -> RecordFile:
        return self._files.setdefault(path, RecordFile(path))

    def _refresh(self) -> None:
        """Read what the files have got since. Raises RunError with the number of a damaged line, each time."""
        if self._held:
            return
        stamp = _stamp(self.tuning, self.runs)
        if stamp and stamp == self._stamp:  # nothing: cheap, because it is asked for every run without a record
            return
        self._read, self._stamp = {}, []
        self._files = {path: self._file(path) for path in self._paths()}
        for file in self._files.values():
            file.read_new()
        self._read, self._stamp = self._merged(), stamp

    def _merged(self) -> dict[str, Record]:
        """The records of all files. Of two of a run, that in runs/ counts, which has the outcomes."""
        merged: dict[str, Record] = {}
        for file in self._files.values():
            for name, record in file.records.items():
                known = merged.setdefault(name, record)
                check_same(known, record)
                if known.path.parent == self.tuning != record.path.parent:
                    merged[name] = record
        return merged


def _stamp(*folders: Path) -> list[tuple[str, int, int, int]]:
    """The path, inode, modification and size of each file of records in the folders; empty if one cannot be read."""
    found = []
    for folder in folders:
        try:
            with os.scandir(folder) as entries:
                files = [(entry.path, entry.stat()) for entry in entries if entry.name.endswith(".jsonl")]
        except FileNotFoundError:
            found.append((str(folder), 0, 0, 0))
        except OSError:
            return []
        else:
            found += [(path, stat.st_ino, stat.st_mtime_ns, stat.st_size) for path, stat in files]
    return found


def _history(run: Path, epochs: list[int]) -> dict[str, list[float | int | None]]:
    """The columns of metrics.csv for these epochs."""
    history = read_metrics(run)
    return {str(column): [_short(history[column][epoch - 1]) for epoch in epochs] for column in history}


def _recorded(config: Config, epochs: int) -> list[int]:
    """The epochs that the record of a run of `epochs` keeps.

    Of more than EPOCHS it is every second, third, ... and the last, unless some epochs measure what others do not.
    """
    alike = config.eval.every == 1 and config.diagnostics.name == "off"
    return sorted({*range(1, epochs + 1, ceil(epochs / EPOCHS) if alike else 1), epochs})


def _short(value: float) -> float | int | None:
    """The value with six significant digits, enough for a figure; None for an empty field."""
    if pd.isna(value):
        return None
    return int(value) if float(value).is_integer() else float(f"{value:.6g}")


def _rounded(tree: Any) -> Any:
    """A tree of JSON whose floats have nine significant digits, which distinguish all numbers of float32."""
    if isinstance(tree, dict):
        return {key: _rounded(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_rounded(value) for value in tree]
    return float(f"{tree:.9g}") if isinstance(tree, float) else tree
