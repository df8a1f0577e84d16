"""Signals that ask a run to leave off: it does so between two updates, with a checkpoint."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import parent_process
from threading import Thread, current_thread, main_thread
from types import FrameType

# Of a user or a system that needs the machine; SIGUSR1 is what Slurm is told to send ahead of the time limit.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(KeyboardInterrupt):
    """A run has left off as it was asked to, and the same command goes on from there."""

    exit_code = 75  # the system's EX_TEMPFAIL: try again


@dataclass
class Notice:
    """The name of the signal that has come, or None."""

    signal: str | None = None


@contextmanager
def noticed() -> Iterator[Notice]:
    """Inside, the signals only leave a notice; a second SIGINT interrupts as ever. One that has come and made nobody
    raise Stopped is passed on at the end."""
    notice, owner = Notice(), os.getpid()
    if current_thread() is not main_thread():  # where Python has no signals
        yield notice
        return

    def take(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a data worker, which has only inherited this
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if notice.signal is not None and number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        notice.signal = signal.Signals(number).name

    before = {number: signal.signal(number, take) for number in SIGNALS}
    try:
        yield notice
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if notice.signal is not None:
        os.kill(os.getpid(), signal.Signals[notice.signal])


def end_with_parent() -> None:
    """End this process when the one that started it is no more: the next one starts the same run again, and what was
    left behind must not hold its directory."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()
