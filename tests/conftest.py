"""Fixtures of all tests. The process that only hands tests out to workers imports no torch: fixtures do."""

import gc
import os
import signal
import sys
from copy import deepcopy
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: threads only get in each other's way
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:  # by a script's & or by nohup; then what the tests start ignores it
        signal.signal(number, handler)
# A process has one server that forks others. The first test that needs it starts it, with what all of them import.
forkserver.set_forkserver_preload(["experiments.execution.pool", "torch._dynamo", "sklearn.datasets"])
setattr(forkserver, "set_forkserver_preload", lambda modules: None)  # noqa: B010 (mypy refuses an assignment)


def pytest_collection_finish() -> None:
    """What has been imported stays: Python need not look for garbage in it again and again."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def constants_read_once():
    """The digits and the version of the code are read from files once a session, not for every run, and the FLOPs of
    a network are counted once.
    """
    if "lawn.train" not in sys.modules:  # no test asks for a run
        yield
        return
    import sklearn.datasets

    from lawn.train import session, throughput, trainer, vectorized

    environment = cache(session.environment)
    counts: dict[str, float] = {}

    def flops_per_sample(task: Any, model: Any, batch: Any) -> float:
        key = f"{model} {[t.shape for t in batch]}"
        if key not in counts:
            counts[key] = throughput.flops_per_sample(task, model, batch)
        return counts[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sklearn.datasets, "load_digits", cache(sklearn.datasets.load_digits))
        patch.setattr(session, "environment", lambda device: deepcopy(environment(device)))
        for module in (trainer, vectorized):
            patch.setattr(module, "flops_per_sample", flops_per_sample)
        yield


@pytest.fixture
def data_dir() -> Path:
    """The folder with the real datasets that LAWN_DATA names."""
    if "LAWN_DATA" not in os.environ:
        pytest.skip("LAWN_DATA is not set")
    return Path(os.environ["LAWN_DATA"])


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A data_dir with a few samples of every dataset but the digits."""
    from tests.helpers import write_tiny_data

    folder = tmp_path_factory.mktemp("data")
    write_tiny_data(folder)
    return folder


@pytest.fixture
def tiny(tmp_path: Path):
    """Config of a digits run of a second, with more overrides."""
    from tests.helpers import compose

    def make(*overrides: str):
        return compose(
            "train.epochs=4",
            "model.widths=[16]",
            "dataset.limit=200",
            f"runs_dir={tmp_path}/runs",
            "device=cpu",
            *overrides,
        )

    return make


@pytest.fixture
def main(monkeypatch, capsys):
    """run.py's main function: exit code, standard output and standard error of a command line."""
    import run

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # main sets it for its process
        code = run.main()
        return code, *capsys.readouterr()

    return call
