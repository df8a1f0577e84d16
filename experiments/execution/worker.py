"""What a process does that an executor has started: it trains, with its output in a file."""

import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import parent_process
from pathlib import Path

import torch

from lawn.config import Config
from lawn.errors import RunInUseError, UserError
from lawn.output import echo
from lawn.train import train, train_vectorized
from lawn.train.run_directory import RunDirectory
from lawn.train.signals import end_with_parent, raise_on_signal

IN_USE_SECONDS = 60.0  # for which the processes of an executor that was killed may outlive it


def work(configs: Sequence[Config], log: Path, threads: int | None = None) -> int:
    """Train a run, or several vectorized ones, and append the output to `log`.

    Returns the exit code, as of run.py. A process that multiprocessing has started ends with its parent.
    """
    with _output_to(log):
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            with raise_on_signal():
                if parent_process() is not None:
                    end_with_parent()
                _train(configs)
        except KeyboardInterrupt as stop:  # a Stopped among them
            echo(str(stop) or "interrupted")
            return getattr(stop, "exit_code", 130)
        except (UserError, OSError) as error:
            echo(f"error: {error}")
            return getattr(error, "exit_code", UserError.exit_code)
        except Exception as error:
            traceback.print_exc()
            echo(f"error: {type(error).__name__}: {error}".splitlines()[0])
            return UserError.exit_code
    return 0


def _train(configs: Sequence[Config]) -> None:
    """Train those that can begin; raises the error of one that cannot. Waits a while for those in use."""
    deadline = time.monotonic() + IN_USE_SECONDS
    while True:
        while any(map(_in_use, configs)) and time.monotonic() < deadline:
            time.sleep(1)
        failures: list[Exception] = []
        try:
            if len(configs) > 1:
                train_vectorized(configs, failures)
            else:
                train(configs[0])
        except RunInUseError as error:
            failures = [error]
        taken = any(isinstance(error, RunInUseError) for error in failures)  # meanwhile, by another runner
        if not taken or time.monotonic() >= deadline:
            break
    if failures:
        raise failures[0]


def _in_use(config: Config) -> bool:
    try:
        return RunDirectory(config).in_use
    except (UserError, OSError):
        return False  # its training will say what is wrong


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """In the body, standard output and standard error are appended to a file, those of child processes too."""
    kept = {stream: os.dup(stream) for stream in (1, 2)}
    try:
        with path.open("ab") as file:
            for stream in kept:
                os.dup2(file.fileno(), stream)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, before in kept.items():
            os.dup2(before, stream)
            os.close(before)
