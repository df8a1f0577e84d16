"""The signals that ask a run to leave off, and processes that are not to die of them."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from threading import Thread

# Of a user or a system that needs the machine, or closes the terminal; SIGUSR1 is what Slurm is told to send ahead of
# the time limit.
SIGNALS = tuple(s for s in signal.Signals if s.name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"))


@contextmanager
def sheltered(method: str) -> Iterator[None]:
    """Processes that are started inside, by this method of multiprocessing, have the signals blocked: a terminal and
    Slurm send them to all processes of a run, and it is for the first of them to say when it ends."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        if method != "fork":
            resource_tracker.ensure_running()  # after which some versions of Python have unblocked two of them
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def unsheltered() -> None:
    """Take the signals again in a process that was started `sheltered`."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def only_parent_terminates(worker: int = 0) -> None:
    """In a data worker that was started `sheltered`: let the SIGTERM of the process that has started it end it still,
    as torch does with workers that do not end by themselves."""
    if sys.platform != "linux":  # where who has sent a signal is not known
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    Thread(target=wait, daemon=True).start()
