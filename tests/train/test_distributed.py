"""Several ranks on one machine, by train.devices and by torchrun."""

import csv
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from types import SimpleNamespace
from typing import TypeVar

import pytest
import torch

from lawn.composition import with_values
from lawn.config import Config
from lawn.errors import ConfigError, DataError, RunError
from lawn.train import Stopped, prepare, session, spawn, train
from lawn.train.distributed import World
from lawn.train.run_directory import RunDirectory
from tests.helpers import ROOT, compose
from tests.train.faults import DIGITS, stop

T = TypeVar("T")


def last_row(config: Config) -> dict[str, str]:
    with (RunDirectory(config).path / "metrics.csv").open() as file:
        return list(csv.DictReader(file))[-1]


def weights(config: Config) -> dict[str, torch.Tensor]:
    return torch.load(RunDirectory(config).path / "checkpoint.pt", weights_only=True)["model"]


def agree(one: Config, other: Config, tolerance: float = 1e-6) -> None:
    """The same weights, and the same counts in the evaluation."""
    for name, weight in weights(one).items():
        torch.testing.assert_close(weights(other)[name], weight, rtol=0, atol=tolerance)
    first, second = last_row(one), last_row(other)
    for key, value in first.items():
        exact = key in ("epoch", "step", "constrained", "test_accuracy", "test_top5", "test_hr10", "test_hr20")
        assert second[key] == value if exact else float(second[key]) == pytest.approx(float(value), rel=1e-3), key


@pytest.mark.parametrize("optim", ["adam_lawn", "lamb_lawn", "sgd"])
@pytest.mark.parametrize("micro", [pytest.param((), marks=pytest.mark.slow), ("train.micro_batch_size=7",)])
def test_two_ranks_give_what_one_process_gives(tmp_path, tiny, capsys, monkeypatch, optim, micro):
    """20 updates, the last of each epoch smaller than the others; and they share a core with a warning."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    switch = ("optim.free_epochs=1",) if "lawn" in optim else ()
    common = ("train.epochs=2", "dataset.limit=195", "train.batch_size=20", f"optim={optim}", "optim.lr=0.01", *switch)
    one = tiny(*common, f"run_dir={tmp_path}/one")
    two = tiny(*common, *micro, "train.devices=2", f"run_dir={tmp_path}/two")
    train(one)
    train(two)
    assert last_row(two)["step"] == "20"
    assert "warning: train.devices=2: so many processes share 1 CPU cores\n" in capsys.readouterr().out
    agree(one, two)


def test_alone_nothing_is_communicated():
    world = World(torch.device("cpu"))
    rows, model = torch.rand(3, 2), torch.nn.BatchNorm1d(2)
    assert world.is_main
    assert world.broadcast("value") == "value"
    assert world.all_reduce_sum(rows) is rows
    assert world.all_gather_rows(rows) is rows
    assert world.wrap_ddp(model) is model
    with world.main_process_first():
        world.average_buffers(model)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.devices=0"], "train.devices=0: must be"),
        (["train.micro_batch_size=0"], "train.micro_batch_size=0: must be"),
        (["train.devices=3", "train.batch_size=2"], "train.devices=3: must be at most train.batch_size=2"),
        (["train.devices=2", "device=cpu:0"], "device=cpu:0: 2 ranks cannot share it; choose auto, cpu or cuda"),
        (["train.sync_batchnorm=true", "device=cpu"], "train.sync_batchnorm=True: torch has it for GPUs only"),
        (["train.precision=fp16"], "train.precision=fp16: must be one of fp32, tf32, bf16"),
        (["train.precision=tf32", "device=cpu"], "train.precision=tf32: is a format of GPUs"),
        (["train.compile=fast"], "train.compile=fast: must be one of off, default, reduce-overhead"),
    ],
)
def test_what_ranks_and_devices_cannot_be(overrides, message):
    with pytest.raises(ConfigError) as caught:
        train(compose("runs_dir=/nowhere", *overrides))
    assert message in str(caught.value)


def test_what_a_rank_refuses_ends_the_run_with_its_own_words(tmp_path):
    with pytest.raises(DataError, match=r"nowhere/imagenet/train: "):
        train(compose("dataset=imagenet", "data_dir=/nowhere", "train.devices=2", f"runs_dir={tmp_path}", "device=cpu"))


def test_the_recommender_too(tmp_path, tiny_data):
    """Negatives are drawn for all ranks at once; 30 users and 2,000 samples do not divide by three, and the last update
    of an epoch has two samples."""
    common = ("dataset=movielens100k", "model.factors=4", "dataset.candidates=20", "train.batch_size=333")
    common += ("train.epochs=3", "optim.free_epochs=1", f"data_dir={tiny_data}", "device=cpu")
    one, three = (compose(*common, f"train.devices={n}", f"run_dir={tmp_path}/{n}") for n in (1, 3))
    train(one)
    train(three)
    agree(one, three)


def test_flooding_is_of_the_mean_of_all_ranks_and_parts(tmp_path, tiny):
    """Above the level in the first updates, below it later: the gradient turns."""
    common = ("loss=flooding", "loss.level=1.5", "dataset.limit=100", "train.batch_size=50", "optim.lr=0.02")
    common += ("train.epochs=12", "optim.free_epochs=11")
    one = tiny(*common, f"run_dir={tmp_path}/one")
    parts = tiny(*common, "train.micro_batch_size=9", f"run_dir={tmp_path}/parts")
    two = tiny(*common, "train.micro_batch_size=9", "train.devices=2", f"run_dir={tmp_path}/two")
    for config in (one, parts, two):
        train(config)
    agree(one, parts)
    agree(one, two)
    assert 1.5 <= float(last_row(one)["train_loss"]) < 1.6


@pytest.mark.slow
def test_batch_norm_sees_the_same_parts_on_any_number_of_ranks(tmp_path, tiny_data):
    """Its statistics are per part, so one rank with two parts trains as two ranks with one each; what evaluation uses
    is the mean over the ranks instead of the average over time."""
    common = (
        "dataset=cifar10",
        f"data_dir={tiny_data}",
        "dataset.limit=16",
        "train.batch_size=8",
        "train.epochs=1",
        "device=cpu",
    )
    one = compose(*common, "train.micro_batch_size=4", f"run_dir={tmp_path}/one")
    two = compose(*common, "train.devices=2", f"run_dir={tmp_path}/two")
    whole = compose(*common, f"run_dir={tmp_path}/whole")
    for config in (one, two, whole):
        train(config)
    statistics = [name for name in weights(one) if "running" in name or "num_batches" in name]
    for name in weights(one).keys() - set(statistics):
        torch.testing.assert_close(weights(two)[name], weights(one)[name], rtol=0, atol=1e-5)
    assert any((weights(whole)[name] - weights(one)[name]).abs().max() > 1e-4 for name in weights(one))


@pytest.mark.slow
def test_a_run_goes_on_within_an_epoch_on_another_number_of_ranks(tmp_path, tiny):
    common = (*DIGITS, "train.epochs=2", "optim.free_epochs=1")
    whole, stopped = (tiny(*common, f"run_dir={tmp_path}/{name}") for name in ("whole", "stopped"))
    train(whole)
    stop(stopped, 18)
    train(tiny(*common, "train.devices=2", f"run_dir={tmp_path}/stopped"))
    agree(whole, stopped)


@pytest.mark.slow
def test_statistics_of_batch_norm_are_averaged_over_the_ranks(tmp_path, tiny_data):
    """After one update the means of the first batch norm are those of the whole batch."""
    common = ("dataset=cifar10", f"data_dir={tiny_data}", "dataset.limit=8", "train.batch_size=8", "train.epochs=1")
    whole, two = (compose(*common, "device=cpu", f"train.devices={n}", f"run_dir={tmp_path}/{n}") for n in (1, 2))
    for config in (whole, two):
        train(config)
    first = next(name for name in weights(whole) if name.endswith("running_mean"))
    assert weights(whole)[first].abs().max() > 1e-3
    torch.testing.assert_close(weights(two)[first], weights(whole)[first], rtol=0, atol=1e-6)


def children(pid: int) -> list[int]:
    """The processes that this one has started, and those that these have."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # ended in the meantime
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    direct = [child for child, parent in parents.items() if parent == pid]
    return direct + [further for child in direct for further in children(child)]


def ranks_of(pid: int) -> list[int]:
    """Those of the children that are ranks: they have joined a process group, which has a thread of this name."""
    names = {child: [p.read_text() for p in Path(f"/proc/{child}/task").glob("*/comm")] for child in children(pid)}
    return sorted(child for child, threads in names.items() if any("gloo" in name for name in threads))


def wait_for(condition: Callable[[], T], seconds: float) -> T:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)
    return found


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_which_goes_on_with_any_number_of_ranks(tmp_path, tiny):
    common = ("dataset.limit=195", "train.batch_size=20", "optim.free_epochs=1", "train.epochs=20")
    common += ("train.checkpoint_seconds=0",)
    whole, two, one = (tiny(*common, f"train.devices={n}", f"run_dir={tmp_path}/{k}") for k, n in enumerate((1, 2, 1)))
    train(whole)
    killed: list[int] = []

    def kill() -> None:
        wait_for((tmp_path / "1" / "checkpoint.pt").exists, 60)
        killed.append(ranks_of(os.getpid())[-1])
        os.kill(killed[0], signal.SIGKILL)

    thread = Thread(target=kill)
    thread.start()
    with pytest.raises(RunError, match=r"rank . was killed by SIGKILL; .* run the same command again to resume"):
        train(two)
    thread.join()
    assert not RunDirectory(two).done
    shutil.copytree(tmp_path / "1", tmp_path / "2")
    train(two)
    train(one)
    agree(whole, two, 1e-4)
    agree(whole, one, 1e-4)


@pytest.mark.parametrize("code", [-signal.SIGKILL, 1, 75])
def test_a_rank_that_is_stopped_after_another_one_is_no_cause(code):
    """As where the first rank dies outside of an epoch."""
    errors = SimpleQueue()
    errors.put((True, Stopped("SIGTERM: stopped")))
    if code == 1:
        errors.put((False, DataError("no data")))
    processes = [SimpleNamespace(exitcode=75), SimpleNamespace(exitcode=code)]
    message = {-signal.SIGKILL: "rank 1 was killed by SIGKILL", 1: "no data", 75: "SIGTERM: stopped"}[code]
    assert str(spawn._cause(processes, errors)).startswith(message)


@contextmanager
def two_nodes(folder: Path, ranks: int, *keys: list[str]) -> Iterator[list[subprocess.Popen[str]]]:
    """Two groups of torchrun that meet at a port, as on two machines, with a log in `folder` each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--nproc-per-node={ranks}"]
    command += ["--rdzv-id=job", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    nodes = []
    for number, own in enumerate(keys):
        host = f"--rdzv-conf=is_host={1 - number}"
        with (folder / f"node{number}.log").open("w") as output:
            options = {"cwd": ROOT, "stdout": output, "stderr": output, "env": variables}
            nodes.append(subprocess.Popen([*command, host, "run.py", *own], text=True, **options))
    try:
        yield nodes
    finally:
        for process in nodes:
            process.kill()


@pytest.mark.slow
def test_two_machines_with_other_commands_or_data_do_not_train(tmp_path, tiny_data):
    """Each of the ranks would take steps of its own, and the record would be that of the first."""
    other = tmp_path / "data"
    shutil.copytree(tiny_data, other)
    ratings = other / "ml-100k" / "u.data"
    lines = ratings.read_text().splitlines(keepends=True)
    ratings.write_text("".join(line for line in lines if not line.startswith("1\t")))  # a user less
    common = ["dataset=movielens100k", "dataset.candidates=50", "train.epochs=1", "train.batch_size=200", "device=cpu"]
    common += [f"run_dir={tmp_path}/run", f"data_dir={tiny_data}", "optim.lr=0.001"]
    for old, new, message in (
        ("optim.lr=0.001", "optim.lr=0.05", "rank 1 differs from rank 0 (optim.lr is 0.001 there, 0.05 here); start"),
        (f"data_dir={tiny_data}", f"data_dir={other}", "rank 1 has read other data than rank 0 ("),
    ):
        changed = [new if key == old else key for key in common]
        with two_nodes(tmp_path, 1, common, changed) as nodes:
            assert all(process.wait(timeout=120) != 0 for process in nodes)
        for number in (0, 1):
            assert f"error: {message}" in (tmp_path / f"node{number}.log").read_text()
        assert not (tmp_path / "run" / "metrics.csv").exists()


def test_ranks_that_read_folders_and_shards_are_refused(tiny, monkeypatch):
    """Their epochs have other orders, although the images are the same."""
    run = prepare(tiny("train.epochs=1"))
    task = run.build_task(torch.device("cpu"))
    first = "ShardImages", task.dataset.fingerprint
    monkeypatch.setattr(World, "all_gather_object", lambda _, value: [first, value])
    with pytest.raises(DataError, match=rf"rank 1 .* \(ShardImages there, {type(task.dataset).__name__} here\)"):
        session.start_or_resume(run, task, World(torch.device("cpu"), rank=1, size=2), None, None)


@pytest.mark.parametrize(
    ("first", "code", "message"),
    [
        ({"optim.lr": 0.5}, "a", r"optim.lr is 0.5 there, \S+ here"),
        ({"train.epochs": 7}, "a", "train.epochs is 7 there, 1 here"),
        ({}, "b", "the code is b there, a here"),
        ({}, None, None),
        ({"data_dir": "/elsewhere", "train.checkpoint_seconds": 1.0}, "a", None),
    ],
)
def test_ranks_of_other_configs_or_code_are_refused(tiny, monkeypatch, first, code, message):
    config = tiny("train.epochs=1")
    start = with_values(config, first), code
    monkeypatch.setattr(session, "code_version", lambda: "a")
    monkeypatch.setattr(World, "all_gather_object", lambda _, value: [start, value])
    world = World(torch.device("cpu"), rank=1, size=2)
    with pytest.raises(ConfigError, match=rf"rank 1 differs from rank 0 \({message}\)") if message else nullcontext():
        session._check_ranks_alike(config, world)


@pytest.mark.slow
def test_two_nodes_of_two_ranks_and_one_of_them_dies(tmp_path, tiny):
    keys = ["model.widths=[16]", "dataset.limit=195", "train.batch_size=20", "optim.free_epochs=1", "device=cpu"]
    keys += ["train.epochs=400", "train.checkpoint_seconds=0", f"run_dir={tmp_path}/run"]
    with two_nodes(tmp_path, 2, keys, keys) as nodes:
        wait_for((tmp_path / "run" / "checkpoint.pt").exists, 180)
        started = [ranks_of(process.pid) for process in nodes]
        assert [len(ranks) for ranks in started] == [2, 2]
        os.kill(started[1][0], signal.SIGKILL)
        died = time.monotonic()
        assert all(process.wait(timeout=60) != 0 for process in nodes)
    print(f"ended after {time.monotonic() - died:.1f} s")
    first, second = ((tmp_path / f"node{k}.log").read_text() for k in (0, 1))
    assert "the connection to another rank is lost" in first
    assert "run the same command again to resume" in first
    assert "SIGKILL" in second
    assert not (tmp_path / "run" / "DONE").exists()
    whole = tiny(*keys[1:-1], f"run_dir={tmp_path}/whole")
    resumed = tiny(*keys[1:])
    train(whole)
    train(resumed)
    agree(whole, resumed, 1e-3)
