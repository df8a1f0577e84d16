"""Run the jobs of studies until all are done or the time is up."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from math import ceil
from statistics import median

from tqdm import tqdm

from experiments.execution.pool import JobResult, Pool
from experiments.planning.grid import Job
from experiments.planning.study import Study
from experiments.records import Record, Store
from lawn.config import Config
from lawn.errors import UserError
from lawn.train import prepare
from lawn.train.vectorized import vectorization_key

MAX_VECTORIZED = 16
REFRESH_SECONDS = 5.0  # of the progress bar while no job ends


class RuntimeEstimate:
    """Estimates run times from the recorded seconds per epoch of the same dataset, model and batch size.

    A batch size without records is estimated by the nearest one with records.
    """

    def __init__(self, store: Store) -> None:
        self._seen: dict[tuple[str, str, int], list[float]] = {}
        for record in store.all():
            self.add(record)

    def add(self, record: Record) -> None:
        config = record.config
        kind = config["dataset"]["name"], config["model"]["name"], config["train"]["batch_size"]
        self._seen.setdefault(kind, []).append(record.seconds_per_epoch)

    def seconds(self, configs: Iterable[Config]) -> float | None:
        """The seconds of these runs one after the other; None if there is no similar record of one of them."""
        total = 0.0
        for config in configs:
            size = config.train.batch_size
            like = [kind for kind in self._seen if kind[:2] == (config.dataset.name, config.model.name)]
            if not like:
                return None
            nearest = min(like, key=lambda kind: max(kind[2], size) / min(kind[2], size))
            total += median(self._seen[nearest]) * config.train.epochs
        return total


def missing(study: Study, store: Store) -> list[Config]:
    """The runs that a study still needs.

    Runs that depend on the results of others are counted by their expected number, with the config of the cell.
    """
    if study.problem:
        return []
    tuning = study.tuning(store)
    outstanding = [job.config for job in study.outstanding(store)]
    to_be_chosen = study.seeds if study.grid.points and tuning.chosen is None else 0
    return outstanding + [study.grid.config] * (tuning.unknown + to_be_chosen)


def duration(seconds: float | None) -> str:
    return "unknown" if seconds is None else str(timedelta(seconds=round(seconds)))


def vectorizable_with(job: Job, ready: Iterable[Job], slots: int, vectorize: int) -> list[Job]:
    """The job and those to vectorize with it: an equal share for each of the slots, at most `vectorize`."""
    family = vectorization_key(job.config)
    if family is None or not _can_start(job):
        return [job]
    jobs = {other.name: other for other in ready if vectorization_key(other.config) == family and _can_start(other)}
    return list(jobs.values())[: min(vectorize, ceil(len(jobs) / slots))]


def _can_start(job: Job) -> bool:
    """Whether nothing refuses the job before its data is read; otherwise it would fail the jobs vectorized with it."""
    try:
        prepare(job.config)
    except UserError:
        return False
    return True


def run(
    studies: Sequence[Study],
    store: Store,
    slots: Sequence[str],
    budget: float | None = None,
    vectorize: int = MAX_VECTORIZED,
) -> list[JobResult]:
    """Run and record the missing runs until all are done or `budget` seconds are over.

    Returns the jobs that failed and those that diverged. Up to `vectorize` runs of a small model are trained as one
    batched model. A failed job is not repeated, except that jobs that failed in one process are repeated alone. The
    runs that depend on a failed job are not started; all others go on.
    """
    start = time.monotonic()
    estimate = RuntimeEstimate(store)
    tried: set[str] = set()
    alone: set[str] = set()
    failed: list[JobResult] = []
    diverged: list[JobResult] = []

    def ready() -> Iterator[Job]:
        for study in studies:
            yield from (job for job in study.outstanding(store) if job.name not in tried)

    total = sum(len(missing(study, store)) for study in studies)
    with Pool(slots) as pool, tqdm(total=total, unit="run", disable=None) as bar:
        while True:
            while (job := next(ready(), None)) is not None and pool.takes(job):
                others = (other for other in ready() if other.name not in alone)
                jobs = [job] if job.name in alone else vectorizable_with(job, others, pool.free, vectorize)
                tried |= {job.name for job in jobs}
                pool.start(jobs)
            left = float("inf") if budget is None else budget - (time.monotonic() - start)
            if left <= 0:
                tqdm.write("the time is up; run the same command again to resume")
            if not pool.running or left <= 0:
                return failed + diverged
            for ended in pool.wait(min(left, REFRESH_SECONDS)):
                job, outcome = ended.job, ended.failure
                record = None
                if outcome is None:
                    try:
                        record = store.write(job.config, job.overrides, job.tunes)
                    except UserError as error:
                        ended = replace(ended, failure=str(error), group_size=1)
                        outcome = ended.failure
                if record is not None:
                    estimate.add(record)
                    outcome = "diverged" if record.diverged else f"{record.value('headline'):.2f}"
                    if record.diverged:
                        diverged.append(replace(ended, diverged=True))
                elif ended.group_size > 1:
                    tried.remove(job.name)
                    alone.add(job.name)
                    outcome = f"{outcome}; once more, alone"
                else:
                    failed.append(ended)
                to_do = [config for study in studies for config in missing(study, store)]
                done, left_over = total - len(to_do), estimate.seconds(to_do)
                bar.update(done - bar.n)
                tqdm.write(
                    f"{job.name}: {outcome} ({duration(ended.seconds)}); {done} of {total} done, "
                    f"{pool.running} running, {len(failed)} failed, "
                    f"{duration(left_over and left_over / len(slots))} left"
                )
            bar.refresh()
