"""Runs that something happens to, which the tests of faults share."""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from pathlib import Path

import pytest
import torch

import run
from lawn.config import Config
from lawn.train import Stopped, train
from lawn.train.run_directory import RunDirectory
from lawn.train.trainer import Trainer

FILES = ("metrics.csv", "result.json")

ALWAYS = "train.checkpoint_seconds=0"  # after every update

DIGITS = ("train.batch_size=16", "optim.free_epochs=2", "optim.lr=0.01")  # 13 updates an epoch

NCF = ("dataset=movielens100k", "model.factors=4", "dataset.candidates=20", "train.batch_size=90", "train.epochs=8")

VGG = ("dataset=cifar10", "optim=sgd", "dataset.limit=24", "train.batch_size=8", "train.epochs=2")


def outcome(config: Config) -> tuple[dict[str, torch.Tensor], list[bytes]]:
    path = RunDirectory(config).path
    model = torch.load(path / "checkpoint.pt", weights_only=True)["model"]
    return model, [(path / name).read_bytes() for name in FILES]


def check_equal(one: Config, other: Config) -> None:
    """Bit by bit; NaN equals NaN."""
    (weights, files), (expected, expected_files) = outcome(one), outcome(other)
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=0, equal_nan=True, msg=name)
    assert files == expected_files


def begun(config: Config) -> int:
    """Changes whenever a process has begun, or gone on, with the run."""
    path = RunDirectory(config).path / "env.json"
    return path.stat().st_mtime_ns if path.exists() else 0


def after(updates: int, act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something after so many updates of this process."""
    update, made = Trainer.after_update, 0

    def counted(run: Trainer) -> None:
        nonlocal made
        update(run)
        made += 1
        if made == updates:
            act()

    monkeypatch.setattr(Trainer, "after_update", counted)


def send(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def stop(config: Config, updates: int, number: signal.Signals = signal.SIGTERM) -> str:
    """Train so far; what is said at the end."""
    with pytest.MonkeyPatch.context() as patch:
        after(updates, send(number), patch)
        with pytest.raises(Stopped) as stopped:
            train(config)
    return str(stopped.value)


def command(config: Config, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of run.py for a run of the digits."""
    monkeypatch.setattr(sys, "argv", ["run.py", *overrides(config)])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # main sets it for its process
    return run.main()


def overrides(config: Config) -> list[str]:
    """What run.py has to be given for a run of the digits."""
    keys = ("train.epochs", "train.batch_size", "optim.free_epochs", "optim.lr", "train.checkpoint_seconds")
    keys = (*keys, "dataset.limit", "model.widths", "runs_dir", "device")
    values = {key: reduce(getattr, key.split("."), config) for key in keys}
    return [f"{key}={str(value).replace(' ', '')}" for key, value in values.items()]


def copied(config: Config, folder: Path) -> Config:
    shutil.copytree(RunDirectory(config).path, folder)
    return replace(config, run_dir=str(folder))
