"""The run directory: what a run was, what it gave, and where it can go on from.

config.yaml    the resolved config          env.json     code version, packages, hardware
metrics.csv    a row for each epoch         result.json  how it ended, written last but for the marker
checkpoint.pt  the newest full state        timing.json  how long it took
checkpoint_previous.pt  the one before it   DONE         empty; the run is finished
.lock          held while a process is at work
"""

import base64
import csv
import io
import json
import sys
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from lawn.config import Config, run_name
from lawn.data.fingerprint import Fingerprint
from lawn.errors import WRITTEN_AGAIN, RunError
from lawn.files import atomic, locked, still_at, write_text
from lawn.train.progress import echo

Row = dict[str, float | int | None]
CHECKPOINT_VERSION = 4
LOCK = ".lock"
LAST_KEY = "run_dir"  # of config.yaml: without it something is cut off
TIMES = ("samples_per_second", "peak_share", "seconds")  # of a result: what another run of the same config changes
CHECKPOINTS = ("checkpoint.pt", "checkpoint_previous.pt")
FILES = ("config.yaml", "env.json", "metrics.csv", "result.json", "timing.json", "diagnostics.png", *CHECKPOINTS)


class RunDirectory:
    """The files of one run, each written atomically. Raises RunError when `run_dir` belongs to another run, and where
    it is deleted or moved while the run is at work."""

    def __init__(self, config: Config) -> None:
        name = run_name(config)
        self.hash = name.rpartition("-")[2]
        self.path = Path(config.run_dir) if config.run_dir else Path(config.runs_dir) / name
        self.name = self.path.resolve().name  # of "." too
        self._config = config
        self._lock: IO[str] | None = None
        self._check_owner()

    @property
    def done(self) -> bool:
        return (self.path / "DONE").exists()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the directory's lock. Raises RunError if another process holds it, or if it cannot be written."""
        with ExitStack() as held:
            try:
                self._lock = held.enter_context(locked(self.path / LOCK))
            except OSError as error:
                raise RunError(f"{self.path}: cannot be written ({error})") from error
            if self._lock is None:
                raise RunError(f"{self.path}: another process is at work on this run; wait for it, or stop it")
            self._check_owner()
            for name in FILES:
                for left_by_a_killed_process in self.path.glob(f".{name}.*"):
                    left_by_a_killed_process.unlink()
            try:
                yield
            finally:
                self._lock = None

    @contextmanager
    def _here(self) -> Iterator[None]:
        """Around writing a file. Raises RunError where the directory is no longer the one that `lock` holds."""
        self._check_lock()
        try:
            yield
        except FileNotFoundError:
            self._check_lock()
            raise

    def _check_lock(self) -> None:
        if self._lock is not None and not still_at(self.path / LOCK, self._lock):
            raise RunError(
                f"{self.path}: was deleted or moved while the run was at work in it, which has stopped; moved back, "
                "the same command goes on from its last checkpoint"
            )

    def begin(self, execution: dict[str, Any]) -> None:
        """Write config.yaml and env.json; a run that goes on keeps its first environment and lists the later ones."""
        content = {"hash": self.hash, **asdict(self._config)}
        now, path = {**execution, "command": sys.argv[1:]}, self.path / "env.json"
        if path.exists() or any(checkpoint.exists() for checkpoint in self._checkpoints):
            try:
                first = read_environment(self.path)
            except RunError as error:  # a run that was killed early has left none that anything depends on
                echo(f"warning: {str(error).partition(';')[0]}; what the run was begun with is not known any more")
                first = {**now, "git": None, "dirty": None}
            now = {**first, "resumed": [*first.get("resumed", []), now]}
        try:
            with self._here():
                write_text(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(content)))
                write_text(path, json.dumps(now, indent=1) + "\n")
        except (OSError, ValueError) as error:  # the latter of names that cannot be encoded
            raise RunError(f"{self.path}: cannot be written ({error})") from error

    @property
    def fingerprint(self) -> Fingerprint | None:
        """Of the data that the run was last at work on; None where that is not known."""
        try:
            first = json.loads((self.path / "env.json").read_text("utf8"))
            found = [first, *first.get("resumed", [])][-1].get("data")
        except (OSError, ValueError, TypeError, AttributeError):  # none, or damaged
            return None
        return found if isinstance(found, dict) else None

    def write_metrics(self, rows: list[Row]) -> None:
        """Rewrite metrics.csv; an undefined or unmeasured value is an empty field."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        with self._here():
            write_text(self.path / "metrics.csv", text.getvalue())

    def save(self, state: dict[str, Any]) -> None:
        """A new checkpoint.pt; the one before it stays as checkpoint_previous.pt."""
        with self._here(), atomic(*self._checkpoints) as temporary:
            buffer = io.BytesIO()  # of a disk that is full torch would say nothing of use
            torch.save(_own({"version": CHECKPOINT_VERSION, "hash": self.hash, **state}), buffer)
            temporary.write_bytes(buffer.getbuffer())

    def load(self) -> dict[str, Any] | None:
        """The newest state that is whole, on the CPU, or None when there is none. One that is damaged is named, and the
        one before it taken. Raises RunError where none is left."""
        found = [path for path in self._checkpoints if path.exists()]
        problems = []
        for path in found:
            try:
                state = self._read(path)
            except RunError as error:
                problems.append(str(error))
                continue
            for problem in problems:
                echo(f"warning: {problem}; going on from {path.name}")
            return state
        if problems:
            raise RunError(f"{'; '.join(problems)}; delete {' and '.join(p.name for p in found)} to start over")
        return None

    @property
    def _checkpoints(self) -> tuple[Path, Path]:
        return self.path / CHECKPOINTS[0], self.path / CHECKPOINTS[1]

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            with ZipFile(path) as archive:  # torch does not look at its checksums
                damaged = archive.testzip()
            if damaged is not None:
                raise BadZipFile(f"the checksum of {damaged} is another")
            state = torch.load(path, map_location="cpu", weights_only=True)
            found = state.get("version"), state.get("hash")
        except Exception as error:  # both raise what the damage makes them raise
            raise RunError(f"{path}: cannot be read ({type(error).__name__}: {str(error).splitlines()[0]})") from error
        if found != (CHECKPOINT_VERSION, self.hash):
            raise RunError(
                f"{path}: is of format {found[0]} and run {found[1]}, not {CHECKPOINT_VERSION} and {self.hash}"
            )
        return state

    def draw(self) -> None:
        """diagnostics.png, from metrics.csv."""
        from lawn.diagnostics import figure  # matplotlib is a second to import

        with self._here(), atomic(self.path / "diagnostics.png") as temporary:
            figure.save({self.name: figure.read(self.path)}, temporary)

    def finish(self, result: dict[str, Any]) -> None:
        """result.json has what the run gave; timing.json how long it took, which no other run gives again."""
        timing = {key: result[key] for key in TIMES}
        given = {key: value for key, value in result.items() if key not in TIMES}
        with self._here():
            write_text(self.path / "timing.json", json.dumps(timing, indent=1) + "\n")
            write_text(self.path / "result.json", json.dumps(given, indent=1) + "\n")
            (self.path / "DONE").touch()

    def result(self) -> dict[str, Any]:
        """As `finish` was given it. Raises RunError where it is damaged."""
        return read_result(self.path)

    def _check_owner(self) -> None:
        """Raises RunError where the directory is another run's."""
        if any((self.path / name).exists() for name in FILES):
            owner = self._owner()
            if owner != self.hash:
                raise RunError(
                    f"run_dir={self.path}: holds run {owner}, this config is run {self.hash}; choose another"
                )

    def _owner(self) -> str:
        try:
            return str(read_config(self.path, "hash")["hash"])
        except RunError as error:
            raise RunError(f"{error}, or choose another run_dir") from error


def read_config(folder: Path, *needed: str) -> dict[str, Any]:
    """config.yaml of a run directory. Raises RunError where it cannot be read, or lacks a key."""
    path = folder / "config.yaml"
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(path))
        for key in needed:
            content[key]
    except Exception as error:  # the system's, YAML's or OmegaConf's, of several lines
        reason = f"no {error}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
        raise RunError(f"{path}: cannot be read ({reason}); put it back") from error
    return content


def read_environment(folder: Path) -> dict[str, Any]:
    """env.json of a run directory. Raises RunError where it is damaged."""
    return _json(folder / "env.json", "git", "dirty")


def read_result(folder: Path) -> dict[str, Any]:
    """The result of a finished run, with its times. Raises RunError where they are damaged."""
    result = _json(folder / "result.json", "status", "split", "headline", "last")
    if set(TIMES) <= set(result):  # as older versions have written it
        return result
    return result | _json(folder / "timing.json", *TIMES)


def _json(path: Path, *needed: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf8"))
        if not isinstance(content, dict) or not set(needed) <= set(content):
            raise ValueError(f"without {', '.join(needed)}")
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({error}); {WRITTEN_AGAIN}") from error
    return content


def packed(outcomes: Tensor) -> str:
    """Whole numbers from 0 as text: 16 bits each, the first byte the lower one, compressed; see `unpacked`."""
    data = outcomes.clamp(0, 2**15 - 1).numpy().astype("<i2").tobytes()
    return base64.b64encode(zlib.compress(data, 9)).decode()


def unpacked(text: str) -> np.ndarray:
    """The numbers that `packed` was given [samples]. Raises ValueError for a text that it has not made."""
    try:
        return np.frombuffer(zlib.decompress(base64.b64decode(text, validate=True)), dtype="<i2").astype(np.int64)
    except zlib.error as error:
        raise ValueError(f"damaged outcomes ({error})") from error


def _own(value: Any) -> Any:
    """The same, with a copy of every tensor that is a slice of a larger one: all of that would be saved."""
    if isinstance(value, Tensor):
        return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
    if isinstance(value, dict):
        return {key: _own(item) for key, item in value.items()}
    return type(value)(map(_own, value)) if isinstance(value, list | tuple) else value
