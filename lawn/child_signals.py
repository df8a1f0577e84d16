"""The signals that stop a run, and child processes that must not die of them."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from threading import Thread, current_thread, main_thread

# From a user, a closed terminal or a system that needs the machine. Slurm can send SIGUSR1 before the time limit.
SIGNALS = tuple(s for s in signal.Signals if s.name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"))


@contextmanager
def signals_blocked(method: str) -> Iterator[None]:
    """Processes started in the body, by this start method of multiprocessing, have the signals blocked.

    A terminal and Slurm send a signal to all processes of a run; the main process decides when the others end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        if method != "fork":
            resource_tracker.ensure_running()  # some versions of Python unblock two of them here
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def handlers_kept() -> Iterator[None]:
    """The signals have their handlers again after the body, which may replace them."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        if current_thread() is main_thread():  # Python sets handlers in the main thread alone
            for number, handler in before.items():
                if handler is not None:  # one that Python has not set
                    signal.signal(number, handler)


def unblock_signals() -> None:
    """Unblock the signals in a process that was started within `signals_blocked`."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def end_on_parents_sigterm(worker: int = 0) -> None:
    """Let SIGTERM from its parent still end a data worker that was started within `signals_blocked`.

    torch terminates workers that do not end by themselves in this way.
    """
    if sys.platform != "linux":  # the sender of a signal is not known there
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    Thread(target=wait, daemon=True).start()
