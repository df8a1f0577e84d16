"""A signal stops a run after its update, and the same command resumes it."""

import os
import re
import signal
import time
from threading import Thread

import pytest
import torch

from lawn.child_signals import SIGNALS
from lawn.task import Classification
from lawn.train import Stopped, train, train_vectorized
from lawn.train.run_directory import RunDirectory
from tests.helpers import compose
from tests.train.faults import DIGITS, after, begun, check_equal, send, stop

# In the first epoch, in the second, at the end of the second.
MOMENTS = [(signal.SIGTERM, 1), *((number, 18) for number in SIGNALS), (signal.SIGTERM, 26)]


@pytest.mark.parametrize(("number", "updates"), MOMENTS)
def test_a_signal_stops_after_the_update(tiny, whole, number, updates):
    stopped = tiny(*DIGITS)
    handler = signal.getsignal(number)
    said = stop(stopped, updates, number)
    assert re.match(f"{number.name}: .* has stopped in epoch .*, after {updates} updates", said)
    assert signal.getsignal(number) == handler
    state = RunDirectory(stopped).load()
    assert state is not None
    assert (state["step"], state["left"] is None) == (updates, updates == 26)
    train(stopped)
    check_equal(stopped, whole)


def test_a_signal_in_an_evaluation_stops_at_its_end(tiny, whole, monkeypatch):
    stopped = tiny(*DIGITS)
    rows = Classification.rows
    with monkeypatch.context() as patch:
        patch.setattr(Classification, "rows", lambda *given: send(signal.SIGTERM)() or rows(*given))
        with pytest.raises(Stopped, match=r"SIGTERM: .* has stopped in epoch 1, after 13 updates"):
            train(stopped)
    state = RunDirectory(stopped).load()
    assert state is not None
    assert state["left"] is None
    assert [row["epoch"] for row in state["rows"]] == [1]
    assert state["rows"][0]["test_accuracy"] is not None
    train(stopped)
    check_equal(stopped, whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ranks_stop_at_the_same_update(tiny, tmp_path, number):
    """The process that has started them hands the signal on."""
    keys = (*DIGITS, "train.devices=2", "train.epochs=40")
    whole, stopped = (tiny(*keys, f"run_dir={tmp_path}/{name}") for name in ("whole", "stopped"))
    train(whole)

    def notify() -> None:
        while not begun(stopped):
            time.sleep(0.005)
        time.sleep(0.2)
        os.kill(os.getpid(), number)

    thread = Thread(target=notify, daemon=True)
    thread.start()
    with pytest.raises(Stopped):
        train(stopped)
    thread.join()
    state = RunDirectory(stopped).load()
    assert state is not None
    assert 0 < state["step"] < 40 * 13
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


@pytest.mark.parametrize("optim", ["schedule_free", "muon", "lamb_lawn", "sgd_lawn", "automatic"])
def test_the_middle_of_an_epoch_is_whole_for_other_optimizers(tiny, tmp_path, optim):
    pytest.importorskip({"schedule_free": "schedulefree"}.get(optim, "torch"))
    keys: tuple[str, ...] = ("train.batch_size=16", "train.epochs=2", f"optim={optim}", "optim.lr=0.01")
    if optim == "automatic":  # the switch comes after the stop, whose epoch has been watched in part
        keys = ("train.batch_size=16", "optim.free_epochs=auto", "optim.lr=1e-3", "diagnostics=on")
    whole, stopped = (tiny(*keys, f"run_dir={tmp_path}/{name}") for name in ("whole", "stopped"))
    train(whole)
    stop(stopped, 20)
    train(stopped)
    check_equal(stopped, whole)


def test_an_epoch_that_goes_on_in_another_order_is_a_warning(tiny, tmp_path, capsys):
    """As on a GPU after a CPU; the record keeps it over further stops."""
    config = tiny(*DIGITS, f"run_dir={tmp_path}/run")
    stop(config, 20)
    path = RunDirectory(config).path / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    assert state["order"] == ["cpu"]
    torch.save({**state, "order": ["cuda"]}, path)
    stop(config, 12)
    train(config)
    (told,) = RunDirectory(config).result()["warnings"]
    assert "went on with another kind of device" in told
    assert f"warning: {told}" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [("dataset=cifar10", "dataset.limit=12"), ("dataset=imagenet", "dataset.image_size=32", "dataset.workers=0")],
    ids=["cifar10", "imagenet"],
)
def test_augmentation_and_statistics_go_on_in_the_middle(kind, tiny_data, tmp_path):
    keys = (*kind, f"data_dir={tiny_data}", "device=cpu", "train.batch_size=4", "train.epochs=1", "optim=sgd")
    whole, stopped = (compose(*keys, f"run_dir={tmp_path}/{name}") for name in ("whole", "stopped"))
    train(whole)
    stop(stopped, 2)
    train(stopped)
    check_equal(stopped, whole)


def test_vectorized_runs_stop_at_the_end_of_the_epoch(tiny, tmp_path, monkeypatch):
    keys = [("seed=1",), ("optim.lr=0.02",), ("optim.free_epochs=1",)]
    whole, stopped = ([tiny(*DIGITS, *more, f"runs_dir={tmp_path}/{name}") for more in keys] for name in ("w", "s"))
    train_vectorized(whole)
    with monkeypatch.context() as patch:
        after(3 * 15, send(signal.SIGTERM), patch)
        with pytest.raises(Stopped, match=r"SIGTERM: .* with 2 others has stopped in epoch 2, after 26 updates"):
            train_vectorized(stopped)
    states = [RunDirectory(config).load() for config in stopped]
    assert [state and (state["epoch"], state["left"]) for state in states] == [(2, None)] * 3
    train_vectorized(stopped)
    for one, other in zip(stopped, whole, strict=True):
        check_equal(one, other)


def test_a_run_stopped_in_an_epoch_is_vectorized_with_others(tiny):
    configs = [tiny(*DIGITS, f"seed={seed}") for seed in range(2)]
    stop(configs[0], 20)
    train_vectorized(configs)
    assert all(RunDirectory(config).result()["status"] == "done" for config in configs)
