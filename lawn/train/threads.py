"""The number of CPU threads of a run: as many as other processes leave cores for.

The threads of an operation wait for each other at its end, and spin to do so quickly. If another process needs one of
the cores, a thread waits for its turn there while the others spin. Small operations then take several times as long as
with one thread less.
"""

import os
import time
from dataclasses import dataclass

import psutil
import torch

INTERVAL_SECONDS = 1.0  # over which the load is measured


@dataclass(frozen=True)
class _Usage:
    """CPU seconds since some time in the past: of all processes on the cores of this one, and of this one."""

    at: float
    all: float
    own: float

    @classmethod
    def now(cls) -> "_Usage":
        cores = [times for core, times in enumerate(psutil.cpu_times(percpu=True)) if core in _cores()]
        idle = sum(times.idle + getattr(times, "iowait", 0.0) for times in cores)
        times, at = os.times(), time.monotonic()
        own = times.user + times.system
        known = any(map(sum, cores))  # some sandboxes report zeros
        return cls(at, len(cores) * at - idle if known else own, own)


class FreeCores:
    """Leaves the cores to other processes that these use, while it is entered as a context.

    It never exceeds the number of threads from before: that of OMP_NUM_THREADS, of torch.set_num_threads, or all cores.
    """

    def __init__(self) -> None:
        self._limit = torch.get_num_threads()
        self._first = self._last = _Usage.now()

    def __enter__(self) -> "FreeCores":
        return self

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._limit)

    def adapt(self) -> None:
        """Adapt the number of threads to the load of the last interval, if one has passed."""
        if self._limit == 1 or time.monotonic() - self._last.at < INTERVAL_SECONDS:
            return
        before, self._last = self._last, _Usage.now()
        torch.set_num_threads(max(1, min(self._limit, round(len(_cores()) - _others(before, self._last)))))

    def note(self) -> str:
        """What to say of a machine that was too busy for all threads since the start; empty if it was not."""
        others, cores = _others(self._first, _Usage.now()), len(_cores())
        if others + self._limit < cores + 0.5:
            return ""
        return f"; other processes used {others:.1f} of {cores} cores"


def _others(before: _Usage, after: _Usage) -> float:
    """The number of cores that other processes used between two moments."""
    used = (after.all - before.all) - (after.own - before.own)
    return max(0.0, used / max(after.at - before.at, 1e-9))


def _cores() -> set[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))
