"""Slurm jobs, through submitit."""

import atexit
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import psutil
import submitit
from submitit.core.utils import DelayedSubmission, FailedSubmissionError, UncompletedJobError, pickle_load
from submitit.helpers import TorchDistributedEnvironment

from experiments.execution.executor import (
    CANCELLED,
    DISK_SECONDS,
    LOST,
    JobResult,
    Resources,
    failure,
    job_results,
    make_output,
    output_of,
)
from experiments.execution.slurm_queue import SlurmQueue
from experiments.execution.submitit_files import FOLDERS, forget, is_own, results_at_hand, submitted_files
from experiments.execution.worker import work
from experiments.planning.grid import Job
from lawn.errors import ConfigError, RunError
from lawn.files import exclusively
from lawn.output import echo
from lawn.train import Stopped
from lawn.train.signals import deferred_signals
from lawn.train.submitit_jobs import logs_of, reason_of_loss

POLL_SECONDS = 1.0
MAX_ARRAY = 1000  # jobs, less than Slurm's default MaxArraySize
TIMEOUTS = 1000  # after so many time limits a job is not requeued


@dataclass(frozen=True)
class SubmititWork:
    """What a submitit job does; each rank of a run is a task of it."""

    jobs: Sequence[Job]
    ranks: int
    threads: int

    def __call__(self) -> int:
        """Returns the exit code of rank 0, or requeues the job."""
        environment = submitit.JobEnvironment()
        if self.ranks > 1:
            TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
            os.environ["TORCHELASTIC_RUN_ID"] = environment.job_id  # as torchrun
        if environment.cluster == "slurm":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm sends it ahead of the signal below
        requeue: Any = signal.getsignal(signal.SIGUSR2)  # of submitit
        notices: list[int] = []

        def stop(number: int, _: object) -> None:
            notices.append(number)
            signal.raise_signal(signal.SIGUSR1)

        signal.signal(signal.SIGUSR2, stop)
        code = work([job.config for job in self.jobs], output_of(self.jobs), self.threads)
        if code == Stopped.exit_code and notices:
            try:
                requeue(signal.SIGUSR2, None)
            except Exception as error:  # Slurm may not allow it; a job that has stopped is started again
                echo(f"not requeued: {error}")
        if code and self.ranks > 1:  # srun ends the other ranks, which would wait for this one
            atexit.register(os._exit, code)
        return code

    def checkpoint(self) -> DelayedSubmission:
        """What submitit runs after a requeue."""
        return DelayedSubmission(self)


@dataclass(eq=False)
class _Submitted:
    handle: Any  # submitit's job
    work: SubmititWork
    jobs: list[Job]  # those that have been asked for
    start: float
    silent_since: float | None = None  # when it had ended without a result


class SubmititExecutor:
    """Runs jobs as Slurm jobs (`cluster="slurm"`), or in the same way as processes of this machine ("local").

    The jobs outlive this process. submitit's files in `runs_dir`/.submitit (or .submitit_local) tell other calls which
    of them are still queued or running. Preempted, or shortly before its time limit, a job stops with a checkpoint and
    is requeued.

    `parameters` are those of submitit's AutoExecutor, such as `timeout_min` and `slurm_partition`.
    """

    def __init__(
        self,
        runs_dir: Path,
        resources: Resources,
        size: int,
        cluster: str = "slurm",
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        self.size = size
        self._folder = runs_dir.absolute() / FOLDERS[cluster]
        self._resources = resources
        self._to_submit: list[list[Job]] = []
        self._running: list[_Submitted] = []
        self._found: dict[str, _Submitted] = {}  # of other calls, by the names of their jobs
        self._queue = SlurmQueue() if cluster == "slurm" else None
        limits: dict[str, Any] = {"slurm_max_num_timeout": TIMEOUTS, "local_max_num_timeout": TIMEOUTS}
        try:
            self._submitit = submitit.AutoExecutor(self._folder, cluster, **limits)
            self._submitit.update_parameters(
                name="lawn",
                slurm_array_parallelism=size,
                slurm_srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={resources.cpus}"],
                **(parameters or {}),
            )
        except (RuntimeError, NameError, TypeError, ValueError, AssertionError) as error:
            raise ConfigError(f"--executor: {str(error).splitlines()[0]}") from error

    def __enter__(self) -> "SubmititExecutor":
        self._find()
        return self

    def _find(self) -> None:
        """Find the jobs that other calls have submitted, and delete the files of those that have ended."""
        known = {submitted.handle.job_id for submitted in (*self._running, *self._found.values())}
        paths = {path.name.removesuffix("_submitted.pkl"): path for path in submitted_files(self._folder)}
        new = sorted(paths.keys() - known)
        if new and self._queue is not None:
            self._queue.ask()
        for job_id in new:
            path = paths[job_id]
            if not self._is_alive(self._handle(job_id, ranks=1)):
                forget(self._handle(job_id, ranks=1))
                continue
            try:
                work: Any = DelayedSubmission.load(path).function
                submitted = _Submitted(self._handle(job_id, work.ranks), work, [], time.monotonic())
                self._found |= {job.name: submitted for job in work.jobs}
            except FileNotFoundError:
                continue  # it has just ended
            except Exception as error:  # unpickling what another version has written raises many types
                raise RunError(f"{path}: cannot be read ({error}); delete it if its job has ended") from error

    def _handle(self, job_id: str, ranks: int) -> Any:
        kind = submitit.LocalJob if self._queue is None else submitit.SlurmJob
        return kind(self._folder, job_id, range(ranks))

    def _is_alive(self, handle: Any) -> bool:
        if self._queue is None and handle._process is not None:  # of this process
            return not handle.done()
        if handle.paths.result_pickle.exists():
            return False
        if self._queue is not None:
            return self._queue.may_have(handle.job_id)
        try:
            return str(self._folder) in psutil.Process(int(handle.job_id)).cmdline()
        except (psutil.Error, ValueError):
            return False

    def __exit__(self, *_: object) -> None:
        if self._running:
            ids = " ".join(submitted.handle.job_id for submitted in self._running)
            how = "kill" if self._queue is None else "scancel"
            echo(f"the jobs go on, and the same command finds them; to cancel them: {how} {ids}")

    def places(self, job: Job) -> int:
        return max(0, self.size - len(self._running) - len(self._to_submit))

    @property
    def running(self) -> int:
        return sum(map(len, self._to_submit)) + sum(len(submitted.jobs) for submitted in self._running)

    def start(self, jobs: list[Job]) -> None:
        """Submit the jobs with the next call of `wait`."""
        if new := self._without_found(jobs):
            make_output(new)
            self._to_submit.append(new)

    def _without_found(self, jobs: list[Job]) -> list[Job]:
        """The jobs without those that another call has submitted, which are waited for."""
        new = []
        for job in jobs:
            submitted = self._found.pop(job.name, None)
            if submitted is None:
                new.append(job)
                continue
            submitted.jobs.append(job)
            if submitted not in self._running:
                echo(f"job {submitted.handle.job_id}, of an earlier call: {_names(submitted.work.jobs)}")
                self._running.append(submitted)
        return new

    def wait(self, timeout: float) -> list[JobResult]:
        self._submit()
        deadline = time.monotonic() + timeout
        while not (ended := [submitted for submitted in self._running if self._has_ended(submitted)]):
            left = deadline - time.monotonic()
            if left <= 0:
                return []
            time.sleep(min(POLL_SECONDS, left))
            with suppress(OSError):  # a client of NFS then looks again for what others have written
                self._folder.chmod(self._folder.stat().st_mode)
        self._running = [submitted for submitted in self._running if submitted not in ended]
        self._found = {name: submitted for name, submitted in self._found.items() if submitted not in ended}
        return [result for submitted in ended for result in self._results(submitted)]

    def _submit(self) -> None:
        """Submit what was started since the last time, as arrays of jobs with the same resources."""
        if not self._to_submit:
            return
        with exclusively(self._folder / "submission"), deferred_signals():
            self._find()
            to_submit = [new for jobs in self._to_submit if (new := self._without_found(jobs))]
            self._to_submit = []
            for ranks in sorted({self._resources.ranks(jobs[0]) for jobs in to_submit}):
                alike = [
                    SubmititWork(jobs, ranks, self._resources.cpus)
                    for jobs in to_submit
                    if self._resources.ranks(jobs[0]) == ranks
                ]
                for first in range(0, len(alike), MAX_ARRAY):
                    self._submit_array(alike[first : first + MAX_ARRAY])

    def _submit_array(self, array: list[SubmititWork]) -> None:
        nodes = self._resources.nodes if array[0].ranks > 1 else 1
        tasks = array[0].ranks // nodes
        gpus = tasks * ceil(self._resources.gpus)
        self._submitit.update_parameters(
            nodes=nodes, tasks_per_node=tasks, cpus_per_task=self._resources.cpus, gpus_per_node=gpus or None
        )
        earlier = results_at_hand(self._folder)
        with _detached():
            try:
                handles = self._submitit.submit_array(array)
            except (OSError, subprocess.SubprocessError, FailedSubmissionError, UncompletedJobError) as error:
                raise RunError(f"the jobs could not be submitted: {_reason(error)}") from error
        later, now = results_at_hand(self._folder), time.monotonic()
        for handle, given in zip(handles, array, strict=True):
            path = handle.paths.result_pickle
            if path in earlier and earlier[path] == later.get(path):  # of a job with the same number
                path.unlink()
            echo(f"job {handle.job_id}, submitted: {_names(given.jobs)}")
            self._running.append(_Submitted(handle, given, list(given.jobs), now))

    def _has_ended(self, submitted: _Submitted) -> bool:
        """Whether a job has a result, or is gone for so long that there will be none."""
        if self._is_alive(submitted.handle):
            submitted.silent_since = None
            return False
        now = time.monotonic()
        submitted.silent_since = submitted.silent_since or now
        patience = 0.0 if self._queue is None else DISK_SECONDS
        return (
            submitted.handle.paths.result_pickle.exists()
            or now - submitted.silent_since >= patience
            or all(failure(job, output_of([job])) is None for job in submitted.jobs)  # another call has deleted it
        )

    def _results(self, submitted: _Submitted) -> list[JobResult]:
        seconds = time.monotonic() - submitted.start
        results = job_results(submitted.jobs, submitted.work.jobs, [self._exit_code(submitted.handle)], seconds)
        forget(submitted.handle, succeeded=not any(result.failure for result in results))
        return results

    def _exit_code(self, handle: Any) -> int | str:
        """What `work` returned, or why it did not return."""
        path = handle.paths.result_pickle
        try:
            if not is_own(path):
                return f"{path}: cannot be read (it is another user's)"
            outcome, value = pickle_load(path)
        except FileNotFoundError:
            if self._queue is not None and self._queue.was_cancelled(handle.job_id):
                return f"{CANCELLED}: job {handle.job_id}"
            return f"{LOST}: {reason_of_loss(handle, '--time')}; see {logs_of(handle)}"
        except Exception as error:  # unpickling raises many types
            return f"{path}: cannot be read ({error})"
        return int(value) if outcome == "success" else f"{value.strip().splitlines()[-1]}; see {logs_of(handle)}"


def _names(jobs: Sequence[Job]) -> str:
    others = f" and {len(jobs) - 1} more" if len(jobs) > 1 else ""
    return f"{jobs[0].name}{others}"


def _reason(error: Exception) -> str:
    """Why sbatch has failed, in one line: the last of sbatch, or the first of submitit."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0 if isinstance(error, FailedSubmissionError) else -1]


@contextmanager
def _detached() -> Iterator[None]:
    """Processes started in the body do not get the signals of a terminal."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
