"""Run the jobs of studies until all are done or the time is up."""

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import inf
from pathlib import Path

from tqdm import tqdm

from experiments.execution.agenda import Agenda
from experiments.execution.executor import OUTPUT, Executor, JobResult
from experiments.planning.estimate import RuntimeEstimate, duration
from experiments.planning.grid import Job
from experiments.planning.study import Study
from experiments.records import Store
from lawn.errors import UserError
from lawn.files import is_writable
from lawn.output import echo, keep_going
from lawn.train.progress import shows_bars
from lawn.train.run_directory import RunDirectory

MAX_VECTORIZED = 16
REFRESH_SECONDS = 5.0  # of the progress bar while no job ends
RETRIES = 2  # of a job that was lost with its node


def run(
    studies: Sequence[Study],
    store: Store,
    executor: Executor,
    budget: float | None = None,
    vectorize: int = MAX_VECTORIZED,
) -> list[JobResult]:
    """Run and record the missing runs until all are done or `budget` seconds are over.

    Returns the jobs that failed and those that diverged. Up to `vectorize` runs of a small model are trained as one
    batched model. A failed job is not repeated, except that jobs that failed in one process are repeated alone, and a
    job that was lost with its node is started again, at most RETRIES times. The runs that depend on a failed job are
    not started; all others go on.
    """
    deadline = inf if budget is None else time.monotonic() + budget
    session = _Session(studies, store)
    with session, executor, tqdm(total=session.total, unit="run", disable=not shows_bars(sys.stderr)) as bar:
        if session.total:
            echo(
                f"{session.total} runs to do, at most {executor.size} processes at the same time; the output of a run "
                f"is {OUTPUT} in its run directory"
            )
        while True:
            while (left := deadline - time.monotonic()) > 0:
                jobs = session.agenda.take(executor.places, vectorize)
                if not jobs:
                    break
                missing = [job for job in jobs if not session.finished_before(job)]
                if missing:
                    session.start(executor, missing)
            if not executor.running and (left > 0 or not session.agenda.waiting):
                break
            if left <= 0:
                echo("the time is up; run the same command again to resume")
                break
            for ended in executor.wait(min(left, REFRESH_SECONDS)):
                how = session.end(ended)
                echo(
                    f"{ended.job.name}: {how} ({duration(ended.seconds)}); {session.done} of {session.total} done, "
                    f"{executor.running} running, {session.failed} failed, {session.time_left(executor.size)} left"
                )
            with keep_going(sys.stderr):
                bar.total = session.total
                bar.update(session.done - bar.n)
                bar.refresh()
    store.sort()
    return session.unsuccessful


class _Session:
    """What one call has done: it records jobs that have ended, and counts."""

    def __init__(self, studies: Sequence[Study], store: Store) -> None:
        self._store, self._estimate = store, RuntimeEstimate(store)
        self.agenda = Agenda(studies, store, self._estimate)
        self.done = self.failed = 0
        self.unsuccessful: list[JobResult] = []
        self._started: dict[str, Job] = {}  # and not ended
        self._losses: Counter[str] = Counter()

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        """Record the runs that have finished in processes that were stopped before all of theirs had."""
        for job in list(self._started.values()):
            self.finished_before(job)

    @property
    def total(self) -> int:
        """The number of runs, which is an estimate as long as some depend on the results of others."""
        return self.done + self.agenda.remaining

    def time_left(self, processes: int) -> str:
        seconds = self.agenda.seconds_left
        return duration(seconds and seconds / max(1, min(processes, self.agenda.remaining)))

    def finished_before(self, job: Job) -> bool:
        """Whether another call or command has finished the run since; it is recorded then."""
        if self._store.has(job.name):
            self._recorded(job)
            return True
        try:
            done = RunDirectory(job.config).done
        except (UserError, OSError):
            return False  # its process will say what is wrong
        if done:
            echo(f"{job.name}: has finished, {self.end(JobResult(job, 0.0, None, 1))}")
        return done

    def start(self, executor: Executor, jobs: list[Job]) -> None:
        """Start a process for these jobs. They have failed if its output cannot be written, but others can."""
        self._started |= {job.name: job for job in jobs}
        try:
            executor.start(jobs)
        except OSError as error:
            if not is_writable(Path(jobs[0].config.runs_dir)):
                raise
            for job in jobs:
                echo(f"{job.name}: {self.end(JobResult(job, 0.0, str(error), len(jobs)))}")

    def end(self, ended: JobResult) -> str:
        """Record a job that has ended, or let it be started once more; returns how it has ended, in words."""
        job = ended.job
        self._started.pop(job.name, None)
        if ended.failure is None:
            try:
                record = self._store.write(job.config, job.overrides, job.experiment, job.tunes)
            except UserError as error:
                return self._fail(replace(ended, failure=str(error)))
            self._estimate.add(record)
            self._recorded(job)
            if record.diverged:
                self.unsuccessful.append(replace(ended, diverged=True))
                return "diverged"
            return f"{record.headline:.2f}"
        if ended.lost and self._losses[job.name] < RETRIES:
            self._losses[job.name] += 1
            self.agenda.put_back(job, alone=False)
            return f"{ended.failure}; once more"
        if ended.group_size > 1 and not ended.cancelled:
            self.agenda.put_back(job, alone=True)
            return f"{ended.failure}; once more, alone"
        return self._fail(ended)

    def _recorded(self, job: Job) -> None:
        self.done += 1
        self.agenda.recorded(job)

    def _fail(self, ended: JobResult) -> str:
        self.failed += 1
        self.unsuccessful.append(ended)
        return str(ended.failure)
