"""What the runner asks of an executor, and how a job has ended."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from experiments.planning.grid import Job
from lawn.errors import UserError
from lawn.train import Stopped
from lawn.train.run_directory import RunDirectory

OUTPUT = "output.log"  # in the run directory
LOST = "lost with its process"
CANCELLED = "cancelled"
DISK_SECONDS = 60.0  # after which a remote disk shows what a job on another machine has written


@dataclass(frozen=True)
class JobResult:
    """How a job has ended."""

    job: Job
    seconds: float  # its share of the process, if several jobs were vectorized
    failure: str | None  # why it has no result, in one line
    group_size: int  # jobs that were vectorized in its process
    diverged: bool = False
    lost: bool = False  # with its process or node: it may succeed if it is started again
    cancelled: bool = False  # by the user: it is not started again


class Executor(Protocol):
    """Starts processes that train, and tells which have ended.

    A process has one job, or several vectorized ones. The run directories are on a disk that this process and all of
    those share. What goes on when the context is left depends on the executor; nothing is lost in any case, because a
    run goes on from its checkpoint.
    """

    size: int  # processes at the same time

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def places(self, job: Job) -> int:
        """The number of processes for jobs like this one that can start now."""

    @property
    def running(self) -> int:
        """The number of jobs that were started and have not ended."""

    def start(self, jobs: list[Job]) -> None:
        """Start a process for a job, or for several vectorized ones. Jobs that run already are waited for instead."""

    def wait(self, timeout: float) -> list[JobResult]:
        """The results of the jobs that have ended; waits up to `timeout` seconds for the first."""


@dataclass(frozen=True)
class Resources:
    """What each process on a cluster gets, and the number of processes of a job that uses all devices: its ranks."""

    gpus: float = 1
    cpus: int = 1
    nodes: int = 1
    ranks_per_node: int = 1

    def ranks(self, job: Job) -> int:
        return self.nodes * self.ranks_per_node if job.uses_all_devices else 1


def output_of(jobs: Sequence[Job]) -> Path:
    """The file of the output of a process with these jobs."""
    return Path(jobs[0].config.runs_dir) / jobs[0].name / OUTPUT


def make_output(jobs: Sequence[Job]) -> Path:
    """The same, as a file that can be written. Raises OSError if it cannot."""
    path = output_of(jobs)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.open("ab").close()
    return path


def job_results(
    asked: Sequence[Job], trained: Sequence[Job], ended: Sequence[int | str], seconds: float
) -> list[JobResult]:
    """The results of the jobs `asked` for of those that a process has `trained`.

    `ended` has the exit code of each of its ranks, or why there is none, which may begin with CANCELLED or LOST. It may
    be worth to start a job again that was lost, as after the exit code 75.
    """
    words = [how for how in ended if isinstance(how, str)]
    lost = any(how == Stopped.exit_code or str(how).startswith(LOST) for how in ended)
    cancelled = any(how.startswith(CANCELLED) for how in words)
    patience = DISK_SECONDS if ended[0] == 0 else 0.0
    reasons = [failure(job, output_of(trained), words[0] if words else None, patience) for job in asked]
    return [
        JobResult(
            job, seconds / len(trained), reason, len(trained), lost=lost and reason is not None, cancelled=cancelled
        )
        for job, reason in zip(asked, reasons, strict=True)
    ]


def failure(job: Job, log: Path, why: str | None = None, patience: float = 0.0) -> str | None:
    """Why a job whose process has ended has no result, in one line; None if it has one.

    `why` is told instead of the last line of the output. For `patience` seconds a result is awaited that a remote disk
    does not show yet.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            if RunDirectory(job.config).done:
                return None
        except (UserError, OSError) as error:
            return str(error)
        if time.monotonic() >= deadline:
            break
        time.sleep(0.2)
    if why is not None:
        return why
    if not log.exists():
        return f"{log.parent}: was deleted or moved while the run was at work in it"
    try:
        lines = log.read_text("utf8", "replace").strip().splitlines()
    except OSError as error:
        return f"{log}: cannot be read ({error.strerror}); move it away"
    return (lines[-1] if lines else "ended without a word").removeprefix("error: ")
