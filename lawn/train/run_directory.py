"""The run directory: config, environment, metrics, result and checkpoints of a run.

config.yaml    the resolved config          env.json     code version, packages, hardware
metrics.csv    a row for each epoch         result.json  the result, written at the end
checkpoint.pt  the latest full state        timing.json  durations and rates
checkpoint_previous.pt  the one before it   DONE         an empty file: the run is finished
.lock          held while a process works on the run
"""

import base64
import csv
import io
import json
import os
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
import yaml
from omegaconf import OmegaConf
from torch import Tensor

from lawn.config import Config
from lawn.data.fingerprint import Fingerprint
from lawn.errors import WRITTEN_AGAIN, RunError, RunInUseError
from lawn.files import atomic, is_locked, locked, still_at, write_text
from lawn.identity import changed_keys, run_name
from lawn.output import echo

Row = dict[str, float | int | None]
CHECKPOINT_VERSION = 4
LOCK = ".lock"
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C ten times as fast
LAST_KEY = "run_dir"  # of config.yaml: without it, the file is truncated
TIMES = ("samples_per_second", "peak_share", "seconds")  # of a result: differ between runs of the same config
CHECKPOINTS = ("checkpoint.pt", "checkpoint_previous.pt")
FILES = ("config.yaml", "env.json", "metrics.csv", "result.json", "timing.json", "diagnostics.png", *CHECKPOINTS)


class RunDirectory:
    """The files of one run, each written atomically.

    Raises RunError if `run_dir` belongs to another run, or is deleted or moved during the run.
    """

    def __init__(self, config: Config) -> None:
        name = run_name(config)
        self.hash = name.rpartition("-")[2]
        self.path = Path(config.run_dir) if config.run_dir else Path(config.runs_dir) / name
        self.name = os.path.basename(os.path.realpath(self.path))  # noqa: PTH119 (not "." for run_dir=., nor an error)
        self._config = config
        self._lock: IO[str] | None = None
        self._check_owner()

    @property
    def done(self) -> bool:
        return (self.path / "DONE").exists()

    @property
    def begun(self) -> bool:
        """Whether a process has begun the run."""
        return (self.path / "env.json").exists() or any(checkpoint.exists() for checkpoint in self._checkpoints)

    @property
    def in_use(self) -> bool:
        """Whether a process holds the lock."""
        return is_locked(self.path / LOCK)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the directory's lock. Raises RunInUseError if another process holds it, RunError if it
        cannot be written."""
        with ExitStack() as held:
            try:
                self._lock = held.enter_context(locked(self.path / LOCK))
                if self._lock is None:  # perhaps another process has only asked whether it is `in_use`
                    time.sleep(0.05)
                    self._lock = held.enter_context(locked(self.path / LOCK))
            except OSError as error:
                raise RunError(f"{self.path}: cannot be written ({error})") from error
            if self._lock is None:
                raise RunInUseError(f"{self.path}: another process uses this run directory; wait for it, or stop it")
            self._check_owner()
            for name in FILES:
                for abandoned in self.path.glob(f".{name}.*"):
                    abandoned.unlink()
            try:
                yield
            finally:
                self._lock = None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """In the body, files are written. Raises RunError if the directory is not the locked one any more."""
        self._check_lock()
        try:
            yield
        except FileNotFoundError:
            self._check_lock()
            raise

    def _check_lock(self) -> None:
        if self._lock is not None and not still_at(self.path / LOCK, self._lock):
            raise RunError(
                f"{self.path}: was deleted or moved during the run, which has stopped; if it was moved, move it "
                "back and run the same command again to resume"
            )

    def begin(self, execution: dict[str, Any]) -> None:
        """Write config.yaml and env.json. A resumed run keeps its first environment and lists the later ones."""
        content = {"hash": self.hash, **asdict(self._config)}
        now, path = {**execution, "command": sys.argv[1:]}, self.path / "env.json"
        if self.begun:
            try:
                first = read_environment(self.path)
            except RunError as error:  # it was killed while it wrote the file
                echo(f"warning: {str(error).partition(';')[0]}; the run's initial environment is unknown")
                first = {**now, "git": None, "dirty": None}
            now = {**first, "resumed": [*environments(first)[1:], now]}
        try:
            with self._writing():
                write_text(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(content)))
                write_text(path, json.dumps(now, indent=1) + "\n")
        except (OSError, ValueError) as error:  # ValueError: a name that cannot be encoded
            raise RunError(f"{self.path}: cannot be written ({error})") from error

    @property
    def fingerprint(self) -> Fingerprint | None:
        """The fingerprint of the data that the run used last; None if it is not known."""
        try:
            first = json.loads((self.path / "env.json").read_text("utf8"))
            found = environments(first)[-1].get("data")
        except (OSError, ValueError, TypeError, AttributeError):  # missing or damaged
            return None
        return found if isinstance(found, dict) else None

    def write_metrics(self, rows: list[Row]) -> None:
        """Rewrite metrics.csv; undefined and unmeasured values are empty fields."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        with self._writing():
            write_text(self.path / "metrics.csv", text.getvalue())

    def save(self, state: dict[str, Any]) -> None:
        """Write checkpoint.pt; the previous one becomes checkpoint_previous.pt."""
        with self._writing(), atomic(*self._checkpoints) as temporary:
            buffer = io.BytesIO()  # torch's error for a full disk is not helpful
            torch.save(_without_views({"version": CHECKPOINT_VERSION, "hash": self.hash, **state}), buffer)
            temporary.write_bytes(buffer.getbuffer())

    def load(self) -> dict[str, Any] | None:
        """The first of `states`."""
        return next(self.states())

    def states(self) -> Iterator[dict[str, Any] | None]:
        """The states that the run can go on from, on the CPU, newest first: those of its intact checkpoints, then None,
        the start, unless two have been written.

        A damaged checkpoint is reported if the previous one is to be used. Raises RunError if all are damaged, or if
        another version of this package has written one: it is not damaged, and the run would overwrite it.
        """
        found = [path for path in self._checkpoints if path.exists()]
        start_over = f"delete {' and '.join(path.name for path in found)} to start over"
        problems, intact = [], 0
        for path in found:
            try:
                state = self._read(path)
            except RunError as error:
                problems.append(str(error))
                continue
            if state["version"] != CHECKPOINT_VERSION:
                raise RunError(
                    f"{self._differing(path, state)}; {start_over}, or go on with the version of lawn that wrote it"
                )
            for problem in problems:
                echo(f"warning: {problem}; going on from {path.name}")
            intact += 1
            yield state
        if problems and not intact:
            raise RunError(f"{'; '.join(problems)}; {start_over}")
        if len(found) < len(self._checkpoints):
            yield None

    def drop_checkpoint(self) -> None:
        """Remove the newest checkpoint; the previous one, if any, takes its place."""
        newest, previous = self._checkpoints
        with self._writing():
            if previous.exists():
                previous.replace(newest)
            else:
                newest.unlink()

    @property
    def _checkpoints(self) -> tuple[Path, Path]:
        return self.path / CHECKPOINTS[0], self.path / CHECKPOINTS[1]

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            with ZipFile(path) as archive:  # torch does not verify checksums
                damaged = archive.testzip()
            if damaged is not None:
                raise BadZipFile(f"checksum mismatch in {damaged}")
            state = torch.load(path, map_location="cpu", weights_only=True)
            found = state["version"], state["hash"]
        except Exception as error:  # both raise many types
            raise RunError(f"{path}: cannot be read ({type(error).__name__}: {str(error).splitlines()[0]})") from error
        if found[1] != self.hash:
            raise RunError(self._differing(path, state))
        return state

    def _differing(self, path: Path, state: dict[str, Any]) -> str:
        return (
            f"{path}: has format {state['version']} and run hash {state['hash']}; "
            f"expected {CHECKPOINT_VERSION} and {self.hash}"
        )

    def draw(self) -> None:
        """Draw diagnostics.png from metrics.csv."""
        from lawn.diagnostics import figure  # matplotlib takes a second to import

        with self._writing(), atomic(self.path / "diagnostics.png") as temporary:
            figure.save({self.name: figure.read(self.path)}, temporary)

    def finish(self, result: dict[str, Any]) -> None:
        """Write result.json, timing.json with the parts that are not reproducible, and DONE."""
        timing = {key: result[key] for key in TIMES}
        given = {key: value for key, value in result.items() if key not in TIMES}
        with self._writing():
            write_text(self.path / "timing.json", json.dumps(timing, indent=1) + "\n")
            write_text(self.path / "result.json", json.dumps(given, indent=1) + "\n")
            (self.path / "DONE").touch()

    def result(self) -> dict[str, Any]:
        """The result passed to `finish`. Raises RunError if it is damaged."""
        return read_result(self.path)

    def _check_owner(self) -> None:
        """Raises RunError if the directory belongs to another run."""
        if any((self.path / name).exists() for name in FILES):
            try:
                owner = read_config(self.path, "hash")
            except RunError as error:
                raise RunError(f"{error}, or choose another run_dir") from error
            if owner["hash"] != self.hash:
                raise RunError(
                    f"run_dir={self.path}: holds run {owner['hash']}, this config is run {self.hash}; choose another"
                    + (f" ({changed})" if (changed := changed_keys(owner, self._config)) else "")
                )


def read_config(folder: Path, *needed: str) -> dict[str, Any]:
    """config.yaml of a run directory. Raises RunError if it cannot be read or lacks a key."""
    path = folder / "config.yaml"
    try:
        content = _yaml(path.read_text("utf8"))
        if not isinstance(content, dict):
            raise ValueError("no mapping")
        for key in needed:
            content[key]
    except Exception as error:  # of the system or YAML, with several lines
        reason = f"no {error}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
        raise RunError(f"{path}: cannot be read ({reason}); {_remedy(error, 'put it back')}") from error
    return content


def _remedy(error: Exception, otherwise: str) -> str:
    return "make it readable" if isinstance(error, PermissionError) else otherwise


def _yaml(text: str) -> Any:
    try:
        return yaml.load(text, YAML_LOADER)
    except yaml.YAMLError:  # libyaml does not read the characters of a path that is not in UTF-8
        return yaml.safe_load(text)


def read_environment(folder: Path) -> dict[str, Any]:
    """env.json of a run directory. Raises RunError if it is damaged."""
    return _json(folder / "env.json", "git", "dirty")


def environments(first: dict[str, Any]) -> list[dict[str, Any]]:
    """The environments in which a run was started and resumed, from the content of env.json."""
    return [first, *first.get("resumed", [])]


def read_result(folder: Path) -> dict[str, Any]:
    """The result of a finished run, with its times. Raises RunError if it is damaged."""
    result = _json(folder / "result.json", "status", "split", "headline", "last")
    return result | _json(folder / "timing.json", *TIMES)


def _json(path: Path, *needed: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf8"))
        if not isinstance(content, dict) or not set(needed) <= set(content):
            raise ValueError(f"without {', '.join(needed)}")
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({error}); {_remedy(error, WRITTEN_AGAIN)}") from error
    return content


def encode_outcomes(outcomes: Tensor) -> str:
    """Non-negative integers as text: 16 bits little-endian, zlib, base64; see `decode_outcomes`."""
    data = outcomes.clamp(0, 2**15 - 1).numpy().astype("<i2").tobytes()
    return base64.b64encode(zlib.compress(data, 9)).decode()


def decode_outcomes(text: str) -> np.ndarray:
    """The integers of a text made by `encode_outcomes` [samples]. Raises ValueError for another text."""
    try:
        return np.frombuffer(zlib.decompress(base64.b64decode(text, validate=True)), dtype="<i2").astype(np.int64)
    except zlib.error as error:
        raise ValueError(f"damaged outcomes ({error})") from error


def _without_views(value: Any) -> Any:
    """A copy of every tensor that is a view of a larger storage, which torch.save would save whole."""
    if isinstance(value, Tensor):
        return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
    if isinstance(value, dict):
        return {key: _without_views(item) for key, item in value.items()}
    return type(value)(map(_without_views, value)) if isinstance(value, list | tuple) else value
