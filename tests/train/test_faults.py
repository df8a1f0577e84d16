"""What can happen to a run from outside: it ends clearly, or goes on as if nothing had been."""

import os
import random
import signal
import time
from multiprocessing import get_context
from multiprocessing.process import BaseProcess

import pytest
import torch

from lawn.config import Config
from lawn.errors import RunError
from lawn.train import train
from lawn.train.record import RunDirectory
from tests.helpers import compose

CPU = torch.device("cpu")
FILES = ("metrics.csv", "result.json")
ALWAYS = "train.checkpoint_seconds=0"  # after every update
DIGITS = ("train.batch_size=16", "optim.free_epochs=2", "optim.lr=0.01")  # 13 updates an epoch


def outcome(config: Config) -> tuple[dict[str, torch.Tensor], list[bytes]]:
    path = RunDirectory(config).path
    model = torch.load(path / "checkpoint.pt", weights_only=True)["model"]
    return model, [(path / name).read_bytes() for name in FILES]


def check_equal(one: Config, other: Config) -> None:
    """Bit by bit."""
    (weights, files), (expected, expected_files) = outcome(one), outcome(other)
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name
    assert files == expected_files


def start(config: Config) -> BaseProcess:
    context = get_context("forkserver")
    context.set_forkserver_preload(["lawn.train.launch", "torch._dynamo", "sklearn.datasets"])
    process = context.Process(target=work, args=(config,))
    process.start()
    return process


def work(config: Config) -> None:
    output = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(output, stream)
    torch.set_num_threads(1)
    train(config)


NCF = ("dataset=movielens100k", "model.factors=4", "dataset.candidates=20", "train.batch_size=90", "train.epochs=8")
VGG = ("dataset=cifar10", "optim=sgd", "dataset.limit=24", "train.batch_size=8", "train.epochs=2")


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize(("kind", "window"), [((*NCF, "optim=adam_lawn"), 0.3), (VGG, 2.0)])
def test_killed_at_random_moments(kind, window, devices, tiny_data, tmp_path):
    """20 times, at any moment of a run that writes checkpoints nearly all the time; it ends as if it had not been."""
    moments = random.Random(devices)
    given = (*kind, ALWAYS, f"data_dir={tiny_data}", "device=cpu", f"train.devices={devices}")
    whole = compose(*given, f"run_dir={tmp_path}/whole")
    train(whole)
    killed, within, finished = 0, 0, 0
    while killed < 20 or finished < 1:
        config = compose(*given, f"run_dir={tmp_path}/{finished}")
        before = begun(config)
        process = start(config)
        while begun(config) == before and process.is_alive():
            time.sleep(0.005)
        process.join(moments.uniform(0, window) if killed < 20 else None)
        if process.is_alive():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            killed += 1
            while not free(config):
                time.sleep(0.01)
            within += RunDirectory(config).load() is not None
        else:
            assert process.exitcode == 0
            check_equal(config, whole)
            finished += 1
    assert within >= 10


def begun(config: Config) -> int:
    """Changes whenever a process has begun, or gone on, with the run."""
    path = RunDirectory(config).path / "env.json"
    return path.stat().st_mtime_ns if path.exists() else 0


def free(config: Config) -> bool:
    """Whether the ranks that a killed process has started are gone."""
    try:
        with RunDirectory(config).alone():
            return True
    except RunError:
        return False
