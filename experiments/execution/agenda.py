"""What is to be run next: the jobs of studies that can start, the longest first, and what is left after them."""

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count
from math import ceil, inf

from experiments.planning.estimate import Kind, RuntimeEstimate, kind_of
from experiments.planning.grid import Job
from experiments.planning.study import Study
from experiments.records import Store
from lawn.config import Config
from lawn.errors import UserError
from lawn.train import prepare
from lawn.train.vectorized import vectorization_key


class Agenda:
    """The missing jobs of studies. A job that several studies need is run once.

    The next jobs of a study follow from the records of its present ones, so it is asked again when all of those are
    recorded. The work for each job does not depend on their number.
    """

    def __init__(self, studies: Sequence[Study], store: Store, estimate: RuntimeEstimate) -> None:
        self._store, self._estimate = store, estimate
        self._order = count()
        self._heap: list[tuple[float, int, str]] = []  # of the jobs that wait, and of some that do not any more
        self._waiting: dict[str, Job] = {}
        self._families: dict[str, dict[str, Job]] = {}  # of the waiting jobs that can be vectorized
        self._family: dict[str, str] = {}
        self._present: dict[Study, set[str]] = {}  # jobs of each study without a record
        self._studies: dict[str, list[Study]] = {}  # that need a job
        self._later: dict[Study, int] = {}  # expected number of runs that depend on the present ones
        self._epochs: Counter[Kind] = Counter()  # left, of each kind of run
        self.remaining = 0  # runs, with those that depend on the results of others
        for study in studies:
            self._ask(study)

    @property
    def waiting(self) -> bool:
        """Whether there are jobs that can start as soon as there is a place for them."""
        return bool(self._waiting)

    def take(self, places: Callable[[Job], int], vectorize: int) -> list[Job]:
        """The longest job that can start now, with those to vectorize with it; none if no job can.

        Compatible jobs are shared equally among the free places, at most `vectorize` to a process.
        """
        while self._heap:
            job = self._waiting.get(self._heap[0][2])
            if job is None:
                heapq.heappop(self._heap)
                continue
            free = places(job)
            if not free:
                return []
            return self._remove([job, *self._companions(job, free, vectorize)])
        return []

    def _companions(self, job: Job, free: int, vectorize: int) -> list[Job]:
        family = self._families.get(self._family.get(job.name, ""), {})
        if len(family) < 2 or not _can_start(job):
            return []
        number = min(vectorize, ceil(len(family) / free)) - 1
        found: list[Job] = []
        for other in family.values():
            if len(found) == number:
                break
            if other is not job and _can_start(other):
                found.append(other)
        return found

    def _remove(self, jobs: list[Job]) -> list[Job]:
        for job in jobs:
            del self._waiting[job.name]
            self._leave_family(job)
        return jobs

    def _leave_family(self, job: Job) -> None:
        family = self._family.pop(job.name, None)
        if family is not None:
            del self._families[family][job.name]
            if not self._families[family]:
                del self._families[family]

    def put_back(self, job: Job, alone: bool) -> None:
        """Let a job be started once more, `alone`, or as before."""
        self._put(job)
        if alone:
            self._leave_family(job)

    def _put(self, job: Job) -> None:
        self._waiting[job.name] = job
        seconds = self._estimate.seconds([job.config])
        heapq.heappush(self._heap, (-inf if seconds is None else -seconds, next(self._order), job.name))
        family = vectorization_key(job.config)
        if family is not None:
            self._family[job.name] = family
            self._families.setdefault(family, {})[job.name] = job

    def recorded(self, job: Job) -> None:
        """Account for a job that has a record now."""
        self._count(job.config, -1)
        for study in self._studies.pop(job.name):
            self._present[study].remove(job.name)
            if not self._present[study]:
                self._ask(study)

    def _ask(self, study: Study) -> None:
        """Take up the jobs that a study needs now."""
        jobs, later = study.missing(self._store)
        while later and not jobs:  # another command has just recorded what the rest depends on
            jobs, later = study.missing(self._store)
        unique = {job.name: job for job in jobs}
        self._present[study] = set(unique)
        for job in unique.values():
            if job.name not in self._studies:
                self._studies[job.name] = []
                self._count(job.config, 1)
                self._put(job)
            self._studies[job.name].append(study)
        if study.problem is None:
            self._count(study.grid.config, later - self._later.get(study, 0))
            self._later[study] = later

    def _count(self, config: Config, runs: int) -> None:
        self.remaining += runs
        self._epochs[kind_of(config)] += runs * config.train.epochs

    @property
    def seconds_left(self) -> float | None:
        """The estimated time of the remaining runs one after the other; None if there is no similar record of one."""
        return self._estimate.total((kind, epochs) for kind, epochs in self._epochs.items() if epochs)


def _can_start(job: Job) -> bool:
    """Whether nothing refuses the job before its data is read; otherwise it would fail the jobs vectorized with it."""
    try:
        prepare(job.config)
    except UserError:
        return False
    return True
