"""Signals, sent as terminals and Slurm send them: to all processes of a run."""

import fcntl
import os
import pty
import re
import signal
import termios
from functools import partial
from pathlib import Path

import pytest

from lawn.train.run_directory import RunDirectory
from lawn.train.signals import Stopped, deferred_signals, raise_on_signal
from tests.helpers import Paused, compose

PLACES = {
    "import": "lawn.config",
    "data": "lawn.data.folders:list_split_folders",
    "training": "lawn.train.trainer:Trainer.after_update",
    "evaluation": "lawn.task:Classification.rows",
    "figure": "lawn.train.run_directory:RunDirectory.draw",
    "finish": "lawn.train.run_directory:RunDirectory.finish",
}
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
IMAGES = ("dataset=imagenet", "dataset.image_size=32", "model=mlp", "model.widths=[8]", "device=cpu")
IMAGES = (*IMAGES, "train.batch_size=4", "train.epochs=2", "diagnostics=on")  # 3 updates an epoch


@pytest.fixture
def images(tiny_data, tmp_path):
    return (*IMAGES, f"data_dir={tiny_data}", f"run_dir={tmp_path}/run")


def check_files(keys: tuple[str, ...], phase: str) -> None:
    """The files of a run that a signal has stopped in this phase."""
    directory = RunDirectory(compose(*keys))
    if phase in ("import", "data"):
        assert not directory.path.exists()
        return
    state = directory.load()
    assert state is not None
    if phase in ("figure", "finish"):
        assert directory.result()["status"] == "done"
        assert (directory.path / "diagnostics.png").exists()
        return
    assert (state["epoch"], state["step"]) == ((1, 1) if phase == "training" else (1, 3))
    assert len(state["rows"]) == (phase == "evaluation")


def check_signal(phase: str, number: signal.Signals, workers: int, devices: int, folder: Path, keys) -> None:
    keys = (*keys, f"dataset.workers={workers}", f"train.devices={devices}")
    paused = Paused(folder / "pause", PLACES[phase], *keys)
    paused.reached(devices if phase in ("training", "evaluation") else 1)
    paused.send(number)
    code, out, err = paused.go()
    assert code == Stopped.exit_code, (out, err)
    (line,) = err.splitlines()
    assert line.startswith(f"{number.name}: ")
    if phase in ("training", "evaluation"):
        assert re.search(r" has stopped in epoch 1, after [13] updates; run the same command again to resume$", line)
    check_files(keys, phase)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("phase", PLACES)
def test_every_signal_in_every_phase(images, tmp_path, phase, number, workers, devices):
    check_signal(phase, number, workers, devices, tmp_path, images)


@pytest.mark.parametrize(("phase", "number"), [("import", signal.SIGTERM), ("training", signal.SIGINT)])
def test_some_signals_in_some_phases(images, tmp_path, phase, number):
    check_signal(phase, number, 1, 1, tmp_path, images)


@pytest.fixture
def terminal(images, tmp_path):
    """Both ends of a terminal, and how to start a run of so many ranks at one of them that is in its first update."""
    ours, theirs = pty.openpty()

    def start(devices: int) -> tuple[Paused, tuple[str, ...]]:
        keys = (*images, "dataset.workers=2", f"train.devices={devices}")
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
        controlled = partial(fcntl.ioctl, 0, termios.TIOCSCTTY, 0)
        paused = Paused(tmp_path / "pause", PLACES["training"], *keys, preexec_fn=controlled, **streams)
        os.close(theirs)
        paused.reached(devices)
        return paused, keys

    return ours, start


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_a_ctrl_c_at_a_terminal(terminal, devices):
    """The terminal itself sends the signal, to the group in its foreground."""
    ours, start = terminal
    paused, keys = start(devices)
    os.write(ours, b"\x03")
    code, *_ = paused.go()
    said = os.read(ours, 10_000).decode().strip()
    os.close(ours)
    assert code == Stopped.exit_code, said
    told = r"SIGINT: \S+ has stopped in epoch 1, after 1 updates; run the same command again to resume$"
    assert re.search(told, said)
    check_files(keys, "training")


@pytest.mark.slow
def test_a_terminal_that_is_closed(terminal):
    """SIGHUP, and nowhere to write to any more."""
    ours, start = terminal
    paused, keys = start(1)
    os.close(ours)
    assert paused.go()[0] == Stopped.exit_code
    check_files(keys, "training")


@pytest.mark.parametrize("ignored", [signal.SIGHUP, signal.SIGINT])
def test_what_was_ignored_at_the_start_stays_ignored(ignored):
    """SIGHUP by nohup, SIGINT by a script's &; SIGTERM is taken still."""
    before = signal.signal(ignored, signal.SIG_IGN)
    try:
        for take in (deferred_signals, raise_on_signal):
            with take() as notice:
                signal.raise_signal(ignored)
            assert notice is None or notice.signal is None
        with pytest.raises(Stopped, match=r"^SIGTERM: stopped; "), raise_on_signal():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(ignored, before)


@pytest.mark.slow
def test_a_run_in_the_background_of_a_script_does_not_take_its_ctrl_c(images, tmp_path):
    keys = (*images, "dataset.workers=2")
    paused = Paused(
        tmp_path / "pause",
        PLACES["training"],
        *keys,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    paused.reached()
    paused.send(signal.SIGINT)
    code, _, err = paused.go()
    assert (code, err) == (0, "")
    assert RunDirectory(compose(*keys)).done


def test_a_signal_interrupts_once():
    """Where a run is not at work the first one raises; of more only a second SIGINT does."""

    def raised(*numbers: signal.Signals) -> list[BaseException]:
        found: list[BaseException] = []
        with raise_on_signal():
            for number in numbers:
                try:
                    signal.raise_signal(number)
                except KeyboardInterrupt as interrupt:
                    found.append(interrupt)
        return found

    (stopped,) = raised(signal.SIGUSR1, *SIGNALS)
    assert isinstance(stopped, Stopped)
    assert str(stopped).startswith("SIGUSR1: stopped; ")
    stopped, interrupted = raised(signal.SIGTERM, signal.SIGINT, signal.SIGINT)
    assert isinstance(stopped, Stopped)
    assert not isinstance(interrupted, Stopped)


def test_torchrun_hands_on_the_interrupt_that_a_rank_has_had_already(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    with deferred_signals() as notice:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert notice.signal == "SIGINT"
        notice.signal = None  # or it would be passed on
