"""Signals that ask a run to leave off: it does so between two updates, with a checkpoint."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import parent_process
from threading import Thread, current_thread, main_thread
from types import FrameType

from lawn.signals import SIGNALS, unsheltered
from lawn.train.ranks import started_by_torchrun


class Stopped(KeyboardInterrupt):
    """A run has left off as it was asked to, and the same command goes on from there."""

    exit_code = 75  # the system's EX_TEMPFAIL: try again


@dataclass
class Notice:
    """The name of the first signal that has come, or None."""

    signal: str | None = None


@contextmanager
def noticed() -> Iterator[Notice]:
    """Inside, the signals only leave a notice; a second SIGINT interrupts as ever. One that has come and made nobody
    raise Stopped is passed on at the end."""
    notice = Notice()
    with _taken(notice, lambda: None):
        yield notice
    if notice.signal is not None:
        signal.raise_signal(signal.Signals[notice.signal])


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside, the first of the signals raises Stopped wherever this process is, but for what is `noticed`."""
    notice = Notice()

    def leave() -> None:
        raise Stopped(f"{notice.signal}: stopped; the same command goes on, if anything is left to do")

    with _taken(notice, leave):
        yield


@contextmanager
def _taken(notice: Notice, act: Callable[[], None]) -> Iterator[None]:
    """Inside, the first of the signals leaves its name and does `act`; from a second SIGINT on that one interrupts.
    What was ignored before, as SIGHUP is by nohup, and SIGINT for a script's background, stays so."""
    interrupts = 0

    def take(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        if interrupts > 1 and not started_by_torchrun():  # which hands on the one that its ranks have had already
            signal.default_int_handler(number, frame)
        if notice.signal is None:
            notice.signal = signal.Signals(number).name
            act()

    before = {}
    if current_thread() is main_thread():  # where alone Python has signals
        free = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, take) for number in free}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_parent() -> None:
    """In a process that was started `sheltered`: take signals again, and end when the one that started it is no more:
    the next one starts the same run again, and what was left behind must not hold its directory."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()
    unsheltered()
