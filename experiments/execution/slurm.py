"""Slurm jobs, through submitit."""

import os
import pickle
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import psutil
import submitit
from submitit.core.utils import DelayedSubmission, FailedSubmissionError, UncompletedJobError
from submitit.helpers import TorchDistributedEnvironment

from experiments.execution.executor import DISK_SECONDS, LOST, JobResult, Resources, job_results, make_output, output_of
from experiments.execution.worker import work
from experiments.planning.grid import Job
from lawn.errors import ConfigError, RunError
from lawn.train import Stopped
from lawn.train.progress import echo
from lawn.train.submitit_jobs import logs_of, reason_of_loss

FOLDER = ".submitit"  # in runs_dir
POLL_SECONDS = 1.0
MAX_ARRAY = 1000  # jobs, less than Slurm's default MaxArraySize
TIMEOUTS = 1000  # after so many time limits a job is not requeued


@dataclass(frozen=True)
class SubmititWork:
    """What a submitit job does; each rank of a run is a task of it."""

    jobs: Sequence[Job]
    ranks: int

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
        code = work([job.config for job in self.jobs], output_of(self.jobs))
        if code == Stopped.exit_code and notices:
            requeue(signal.SIGUSR2, None)
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

    The jobs outlive this process. submitit's files in `runs_dir`/.submitit tell the next call which of them are still
    queued or running. Preempted, or shortly before its time limit, a job stops with a checkpoint and is requeued.

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
        self._folder = runs_dir.absolute() / FOLDER
        self._resources = resources
        self._to_submit: list[list[Job]] = []
        self._running: list[_Submitted] = []
        self._found: dict[str, _Submitted] = {}  # by the names of its jobs
        limits: dict[str, Any] = {"slurm_max_num_timeout": TIMEOUTS, "local_max_num_timeout": TIMEOUTS}
        try:
            self._submitit = submitit.AutoExecutor(self._folder, cluster, **limits)
            self._submitit.update_parameters(
                name="lawn",
                slurm_array_parallelism=size,
                slurm_srun_args=["--kill-on-bad-exit=1"],
                **(parameters or {}),
            )
        except (RuntimeError, NameError, TypeError, ValueError, AssertionError) as error:
            raise ConfigError(f"--executor: {str(error).splitlines()[0]}") from error

    def __enter__(self) -> "SubmititExecutor":
        for path in sorted(self._folder.glob("*_submitted.pkl")):
            try:
                work: Any = DelayedSubmission.load(path).function
                handle = self._handle(path.name.removesuffix("_submitted.pkl"), work.ranks)
            except (OSError, ImportError, AttributeError, EOFError, pickle.UnpicklingError) as error:
                raise RunError(f"{path}: cannot be read ({error}); delete it if its job has ended") from error
            if self._is_alive(handle):
                submitted = _Submitted(handle, work, [], time.monotonic())
                self._found |= {job.name: submitted for job in work.jobs}
            else:
                _forget(handle)
        return self

    def _handle(self, job_id: str, ranks: int) -> Any:
        kind = submitit.SlurmJob if self._submitit.cluster == "slurm" else submitit.LocalJob
        return kind(self._folder, job_id, range(ranks))

    def _is_alive(self, handle: Any) -> bool:
        if handle.paths.result_pickle.exists():
            return False
        if self._submitit.cluster == "slurm" or handle._process is not None:
            return not handle.done()
        try:  # submitit only knows the processes that this one has started
            return str(self._folder) in psutil.Process(int(handle.job_id)).cmdline()
        except psutil.Error:
            return False

    def __exit__(self, *_: object) -> None:
        if self._running:
            ids = ", ".join(submitted.handle.job_id for submitted in self._running)
            echo(f"not cancelled: jobs {ids}; the same command finds them")

    def places(self, job: Job) -> int:
        return max(0, self.size - len(self._running) - len(self._to_submit))

    @property
    def running(self) -> int:
        return sum(map(len, self._to_submit)) + sum(len(submitted.jobs) for submitted in self._running)

    def start(self, jobs: list[Job]) -> None:
        """Submit the jobs with the next call of `wait`."""
        new = []
        for job in jobs:
            submitted = self._found.pop(job.name, None)
            if submitted is None:
                new.append(job)
                continue
            submitted.jobs.append(job)
            if submitted not in self._running:
                echo(f"job {submitted.handle.job_id}, of an earlier call: {job.name}")
                self._running.append(submitted)
        if new:
            make_output(new)
            self._to_submit.append(new)

    def wait(self, timeout: float) -> list[JobResult]:
        self._submit()
        deadline = time.monotonic() + timeout
        while not (ended := [submitted for submitted in self._running if self._has_ended(submitted)]):
            left = deadline - time.monotonic()
            if left <= 0:
                return []
            time.sleep(min(POLL_SECONDS, left))
        self._running = [submitted for submitted in self._running if submitted not in ended]
        return [result for submitted in ended for result in self._results(submitted)]

    def _submit(self) -> None:
        """Submit what was started since the last time, as arrays of jobs with the same resources."""
        to_submit, self._to_submit = self._to_submit, []
        for ranks in sorted({self._resources.ranks(jobs[0]) for jobs in to_submit}):
            alike = [jobs for jobs in to_submit if self._resources.ranks(jobs[0]) == ranks]
            for first in range(0, len(alike), MAX_ARRAY):
                self._submit_array([SubmititWork(jobs, ranks) for jobs in alike[first : first + MAX_ARRAY]])

    def _submit_array(self, array: list[SubmititWork]) -> None:
        nodes = self._resources.nodes if array[0].ranks > 1 else 1
        tasks = array[0].ranks // nodes
        gpus = tasks * ceil(self._resources.gpus)
        self._submitit.update_parameters(
            nodes=nodes, tasks_per_node=tasks, cpus_per_task=self._resources.cpus, gpus_per_node=gpus or None
        )
        with _detached():
            try:
                handles = self._submitit.submit_array(array)
            except (OSError, subprocess.SubprocessError, FailedSubmissionError, UncompletedJobError) as error:
                raise RunError(f"the jobs could not be submitted: {str(error).strip().splitlines()[-1]}") from error
        now = time.monotonic()
        self._running += [
            _Submitted(handle, work, list(work.jobs), now) for handle, work in zip(handles, array, strict=True)
        ]

    def _has_ended(self, submitted: _Submitted) -> bool:
        """Whether a job has a result, or is gone for so long that there will be none."""
        if self._is_alive(submitted.handle):
            return False
        now = time.monotonic()
        submitted.silent_since = submitted.silent_since or now
        patience = DISK_SECONDS if self._submitit.cluster == "slurm" else 0.0
        return submitted.handle.paths.result_pickle.exists() or now - submitted.silent_since >= patience

    def _results(self, submitted: _Submitted) -> list[JobResult]:
        seconds = time.monotonic() - submitted.start
        results = job_results(submitted.jobs, submitted.work.jobs, [_exit_code(submitted.handle)], seconds)
        _forget(submitted.handle, keep_logs=any(result.failure for result in results))
        return results


def _exit_code(handle: Any) -> int | str:
    """What `work` returned, or why it did not return."""
    if not handle.paths.result_pickle.exists():
        return f"{LOST}: {reason_of_loss(handle)}; see {logs_of(handle)}"
    rank_0 = handle.task(0)
    if (error := rank_0.exception()) is None:
        return int(rank_0.result())
    *_, last = str(error).partition("-\n")[2].partition("\n---")[0].splitlines()  # of a traceback
    return f"{last}; see {logs_of(handle)}"


def _forget(handle: Any, keep_logs: bool = True) -> None:
    """Delete submitit's files of a job that has ended."""
    for task in range(handle.num_tasks):
        paths = handle.task(task).paths
        paths.result_pickle.unlink(missing_ok=True)
        if not keep_logs:
            paths.stdout.unlink(missing_ok=True)
            paths.stderr.unlink(missing_ok=True)
    handle.paths.submitted_pickle.unlink(missing_ok=True)


@contextmanager
def _detached() -> Iterator[None]:
    """Processes started in the body do not get the signals of a terminal."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
