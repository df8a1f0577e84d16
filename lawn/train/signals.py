"""Signal handlers that stop a run between two updates, with a checkpoint."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import parent_process
from threading import Thread, current_thread, main_thread
from types import FrameType

from lawn.child_signals import SIGNALS, unblock_signals
from lawn.train.distributed import launched_by_torchrun


class Stopped(KeyboardInterrupt):
    """A signal has stopped the run; the same command resumes it."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again


@dataclass
class StopRequest:
    """The name of the first signal that was received, or None."""

    signal: str | None = None


@contextmanager
def deferred_signals() -> Iterator[StopRequest]:
    """In the body, signals only set the request; a second SIGINT raises KeyboardInterrupt.

    A signal that was received is raised again at the end, unless the body raises Stopped.
    """
    request = StopRequest()
    with _handled(request, lambda: None):
        yield request
    if request.signal is not None:
        signal.raise_signal(signal.Signals[request.signal])


@contextmanager
def raise_on_signal() -> Iterator[None]:
    """In the body, the first signal raises Stopped at once, except within `deferred_signals`."""
    request = StopRequest()

    def stop() -> None:
        raise Stopped(f"{request.signal}: stopped; run the same command again to resume")

    with _handled(request, stop):
        yield


@contextmanager
def _handled(request: StopRequest, action: Callable[[], None]) -> Iterator[None]:
    """In the body, the first signal sets the request and calls `action`; a second SIGINT raises KeyboardInterrupt.

    Signals that were ignored before stay ignored: SIGHUP under nohup, SIGINT in the background of a script.
    """
    interrupts = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        # torchrun sends its ranks the SIGINT that they have received already.
        if interrupts > 1 and not launched_by_torchrun():
            signal.default_int_handler(number, frame)
        if request.signal is None:
            request.signal = signal.Signals(number).name
            action()

    before = {}
    if current_thread() is main_thread():  # Python has signal handlers in the main thread alone
        free = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, handle) for number in free}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_parent() -> None:
    """Unblock signals in a process that was started within `signals_blocked`, and exit when its parent exits.

    Otherwise an orphan would hold the lock of the run directory when the same run is started again.
    """
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()
    unblock_signals()
