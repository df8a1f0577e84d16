"""What can happen to a run from outside: it ends clearly, or goes on as if nothing had been."""

import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from lawn.config import Config
from lawn.errors import RunError
from lawn.train import Stopped, train, train_together
from lawn.train.loop import Run
from lawn.train.record import CHECKPOINT_VERSION, RunDirectory
from tests.helpers import compose

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
    try:
        train(config)
    except Stopped as stopped:
        sys.exit(stopped.exit_code)


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


def after(updates: int, act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something after so many updates of this process."""
    update, made = Run.after_update, 0

    def counted(run: Run) -> None:
        nonlocal made
        update(run)
        made += 1
        if made == updates:
            act()

    monkeypatch.setattr(Run, "after_update", counted)


def send(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def stop(config: Config, updates: int, number: signal.Signals = signal.SIGTERM) -> str:
    """Train so far; what is said at the end."""
    with pytest.MonkeyPatch.context() as patch:
        after(updates, send(number), patch)
        with pytest.raises(Stopped) as stopped:
            train(config)
    return str(stopped.value)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("updates", [1, 18, 26])  # in the first epoch, in the second, at the end of the second
def test_a_signal_stops_after_the_update(tiny, tmp_path, number, updates):
    whole, stopped = (tiny(*DIGITS, f"run_dir={tmp_path}/{name}") for name in ("whole", "stopped"))
    train(whole)
    handler = signal.getsignal(number)
    said = stop(stopped, updates, number)
    assert re.match(f"{number.name}: .* has stopped in epoch .*, after {updates} updates", said)
    assert signal.getsignal(number) == handler
    state = RunDirectory(stopped).load()
    assert state is not None
    assert (state["step"], state["left"] is None) == (updates, updates == 26)
    train(stopped)
    check_equal(stopped, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ranks_stop_at_the_same_update(tiny, tmp_path, number):
    """The process that has started them hands the signal on."""
    keys = (*DIGITS, "train.devices=2", "train.epochs=60")
    whole, stopped = (tiny(*keys, f"run_dir={tmp_path}/{name}") for name in ("whole", "stopped"))
    train(whole)
    process = start(stopped)
    while not begun(stopped) and process.is_alive():
        time.sleep(0.005)
    time.sleep(0.2)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == Stopped.exit_code
    state = RunDirectory(stopped).load()
    assert state is not None
    assert 0 < state["step"] < 60 * 13
    train(stopped)
    check_equal(stopped, whole)


def test_a_signal_after_the_last_update_ends_a_run_that_is_done(tiny, monkeypatch):
    config = tiny(*DIGITS)
    after(52, send(signal.SIGINT), monkeypatch)
    with pytest.raises(KeyboardInterrupt) as caught:
        train(config)
    assert not isinstance(caught.value, Stopped)
    assert RunDirectory(config).done


def test_a_second_interrupt_is_obeyed_at_once(tiny, monkeypatch):
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    after(3, twice, monkeypatch)
    with pytest.raises(KeyboardInterrupt) as caught:
        train(tiny(*DIGITS))
    assert not isinstance(caught.value, Stopped)


@pytest.mark.parametrize("optim", ["schedule_free", "muon", "lamb_lawn", "sgd_lawn"])
def test_the_middle_of_an_epoch_is_whole_for_other_optimizers(tiny, tmp_path, optim):
    pytest.importorskip({"schedule_free": "schedulefree"}.get(optim, "torch"))
    keys = ("train.batch_size=16", f"optim={optim}", "optim.lr=0.01")
    whole, stopped = (tiny(*keys, f"run_dir={tmp_path}/{name}") for name in ("whole", "stopped"))
    train(whole)
    stop(stopped, 20)
    train(stopped)
    check_equal(stopped, whole)


@pytest.mark.parametrize(
    "kind", [("dataset=cifar10", "model=resnet50"), ("dataset=imagenet", "dataset.image_size=32", "dataset.workers=0")]
)
def test_augmentation_and_statistics_go_on_in_the_middle(kind, tiny_data, tmp_path):
    keys = (*kind, f"data_dir={tiny_data}", "device=cpu", "train.batch_size=4", "train.epochs=1", "optim=sgd")
    whole, stopped = (compose(*keys, f"run_dir={tmp_path}/{name}") for name in ("whole", "stopped"))
    train(whole)
    stop(stopped, 2)
    train(stopped)
    check_equal(stopped, whole)


def test_runs_that_are_trained_together_stop_at_the_end_of_the_epoch(tiny, tmp_path, monkeypatch):
    keys = [("seed=1",), ("optim.lr=0.02",), ("optim.free_epochs=1",)]
    whole, stopped = ([tiny(*DIGITS, *more, f"runs_dir={tmp_path}/{name}") for more in keys] for name in ("w", "s"))
    train_together(whole)
    with monkeypatch.context() as patch:
        after(3 * 15, send(signal.SIGTERM), patch)
        with pytest.raises(Stopped, match=r"SIGTERM: .* with 2 others has stopped in epoch 2, after 26 updates"):
            train_together(stopped)
    states = [RunDirectory(config).load() for config in stopped]
    assert [state and (state["epoch"], state["left"]) for state in states] == [(2, None)] * 3
    train_together(stopped)
    for one, other in zip(stopped, whole, strict=True):
        check_equal(one, other)


def test_one_that_was_left_in_the_middle_is_taken_in_by_others(tiny):
    configs = [tiny(*DIGITS, f"seed={seed}") for seed in range(2)]
    stop(configs[0], 20)
    train_together(configs)
    assert all(RunDirectory(config).result()["status"] == "done" for config in configs)


def test_another_process_on_the_same_run_is_refused(tiny):
    """The lock is that of a process which is alive, and no more."""
    config = tiny(*DIGITS)
    with RunDirectory(config).alone():
        with pytest.raises(RunError, match="another process is at work on this run"):
            train(config)
        with pytest.raises(RunError, match="another process is at work on this run"):
            train_together([config, tiny(*DIGITS, "seed=1")])
    assert (RunDirectory(config).path / ".lock").exists()
    assert train(config)["status"] == "done"


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    """The files of a run that was left with two checkpoints, and what the run gives in the end."""
    folder = tmp_path_factory.mktemp("stopped")
    config = compose("model.widths=[16]", "dataset.limit=200", "train.epochs=4", "device=cpu", *DIGITS, ALWAYS)
    config = replace(config, run_dir=str(folder / "run"))
    stop(config, 30)
    whole = replace(config, run_dir=str(folder / "whole"))
    train(whole)
    return config, whole


def copied(config: Config, folder: Path) -> Config:
    shutil.copytree(RunDirectory(config).path, folder)
    return replace(config, run_dir=str(folder))


@pytest.mark.parametrize("sixteenths", range(16))
def test_a_checkpoint_that_is_cut_is_named_and_the_one_before_it_taken(stopped_run, tmp_path, capsys, sixteenths):
    config, whole = copied(stopped_run[0], tmp_path / "run"), stopped_run[1]
    path = tmp_path / "run" / "checkpoint.pt"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * sixteenths // 16])
    state = RunDirectory(config).load()
    assert state is not None
    assert state["step"] == 29
    out = capsys.readouterr().out
    assert out.startswith(f"warning: {path}: cannot be read (")
    assert out.endswith("; going on from checkpoint_previous.pt\n")
    if sixteenths in (0, 7, 15):
        train(config)
        check_equal(config, whole)


def test_a_flipped_bit_is_found_wherever_it_matters(stopped_run, tmp_path):
    config = copied(stopped_run[0], tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    content = path.read_bytes()
    expected = RunDirectory(config).load()
    draw = random.Random(0)
    damaged = 0
    for _ in range(200):
        place = draw.randrange(len(content))
        flipped = bytearray(content)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        state = RunDirectory(config).load()
        assert state is not None
        damaged += state["step"] == 29
        if state["step"] == 30:  # in padding, or in a field that nothing is read from
            assert repr(state) == repr(expected)
    assert damaged > 50


def test_no_whole_checkpoint_is_an_error_and_so_is_one_of_another_run(stopped_run, tmp_path):
    config = copied(stopped_run[0], tmp_path / "run")
    newest, previous = (tmp_path / "run" / name for name in ("checkpoint.pt", "checkpoint_previous.pt"))
    previous.write_bytes(b"")
    torch.save({"version": CHECKPOINT_VERSION, "hash": "another"}, newest)
    with pytest.raises(RunError, match=r"run are .* 'another'\).*checkpoint_previous.pt: "):
        train(config)


@pytest.mark.parametrize("damage", [b"epoch,step\n1,", b"", None])
def test_metrics_are_written_anew_from_the_checkpoint(stopped_run, tmp_path, damage):
    config, whole = copied(stopped_run[0], tmp_path / "run"), stopped_run[1]
    metrics = tmp_path / "run" / "metrics.csv"
    metrics.unlink() if damage is None else metrics.write_bytes(damage)
    train(config)
    check_equal(config, whole)
