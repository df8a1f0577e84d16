"""A study: a cell at a budget of epochs, expanded into the runs that choose its hyperparameters and those that fill it.

Choosing follows `search`, on the validation split. Filling: the chosen setting with every seed, on test. What to run
next follows from the records alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count, islice

from experiments.definitions.spec import Cell, Experiment
from experiments.planning import search
from experiments.planning.grid import Grid, Job
from experiments.planning.search import Point
from experiments.records import Record, Store
from lawn.compose import compose
from lawn.config import EvalConfig
from lawn.errors import ConfigError

SELECTIONS = ("val", "test")
CONFIRMING = search.BEST * len(search.CONFIRMING_SEEDS)  # runs, if none of the best loses
PLACES = (  # what --set may say: where and how fast, nothing that names another run
    *("data_dir", "runs_dir", "logger", "logger.project", "logger.mode", "dataset.shards", "dataset.workers"),
    *("train.channels_last", "train.checkpoint_seconds", "train.compile", "train.deterministic", "optim.fused"),
)


@dataclass(frozen=True)
class Tuning:
    """The choice of a study's hyperparameters, as far as it has come."""

    short: list[Job] = field(default_factory=list)  # the grid for a shorter budget
    full: list[Job] = field(default_factory=list)  # for the whole budget, in the order of the search, with seed 0
    confirming: list[Job] = field(default_factory=list)  # the best of these with other seeds
    unknown: int = 0  # about how many more runs of the whole budget are not known yet
    chosen: Point | None = None

    @property
    def jobs(self) -> list[Job]:
        return [*self.short, *self.full, *self.confirming]


class Study:
    """`budgets`: epochs, and those of a shorter schedule to search in, if there is one; none: the dataset's own number.
    `extra` overrides say where and how to run; `experiment` is whose tuning it is.
    """

    def __init__(
        self,
        cell: Cell,
        budgets: tuple[int, ...] = (),
        seeds: int = 3,
        selection: str = "val",
        extra: tuple[str, ...] = (),
        experiment: str = "",
    ) -> None:
        self.cell = cell
        self.budget = budgets[0] if budgets else None
        self.seeds = 0 if cell.whole else seeds
        epochs = () if self.budget is None else (f"train.epochs={self.budget}",)
        self.grid = Grid((*cell.overrides, *epochs), cell.sweep, selection, extra, experiment)
        self.shorter: Grid | None = None
        if len(budgets) > 1 and cell.sweep is not None and not cell.whole:
            overrides = (*cell.overrides, f"train.epochs={budgets[-1]}")
            self.shorter = Grid(overrides, cell.sweep, selection, extra, experiment)

    @property
    def problem(self) -> str | None:
        """Why there is no run of it; None where there is no such."""
        return self.grid.problem or (self.shorter.problem if self.shorter is not None else None)

    def tuning(self, store: Store) -> Tuning:
        """What has to be run to choose the hyperparameters, as far as it follows from what is recorded."""
        if self.problem or not self.grid.points:
            return Tuning()
        if self.cell.whole:
            return Tuning(full=self.grid.jobs())
        start, short, limit = self.grid.points, [], None
        if self.shorter is not None:
            shorter, short, limit = self.shorter, self.shorter.jobs(), search.trials(self.grid.shape)
            if not all(store.has(job.name) for job in short):
                return Tuning(short, unknown=limit + CONFIRMING)
            start = search.ranked(start, lambda point: shorter.score(store, point))
        return replace(self._search(store, start, limit), short=short)

    def _search(self, store: Store, start: list[Point], limit: int | None) -> Tuning:
        """Of at most `limit` points, beginning with the first of `start`; see `search.explore`."""

        def score(point: Point) -> float | None:
            return self.grid.score(store, point)

        def scores(point: Point) -> list[float | None]:
            return [self.grid.score(store, point, seed) for seed in (0, *search.CONFIRMING_SEEDS)]

        def known(point: Point) -> list[float]:
            return [value for value in scores(point) if value is not None]

        tried = search.explore(self.grid.shape, start, limit, score, lambda point: self.grid.job(point) is not None)
        full = self.grid.jobs(tried)
        if any(score(point) is None for point in tried):
            return Tuning(full=full, unknown=max(0, (limit or len(start)) - len(full)) + CONFIRMING)
        confirmed = search.confirm(search.ranked(tried, score), scores)
        confirming = self.grid.jobs(confirmed, search.CONFIRMING_SEEDS)
        done = all(None not in scores(point) for point in confirmed)
        return Tuning([], full, confirming, 0, search.choose(confirmed, known) if done else None)

    def final_runs(self, store: Store) -> Iterator[Job]:
        """The runs that fill the cell, seed after seed without end; none before its hyperparameters are chosen."""
        if self.problem or self.cell.whole:
            return
        setting: tuple[str, ...] = ()
        config = self.grid.config
        if self.cell.sweep is not None:
            chosen = self.tuning(store).chosen
            job = None if chosen is None else self.grid.job(chosen)
            if job is None:
                return
            setting = job.setting
            config = replace(job.config, eval=EvalConfig())
        for seed in count():
            yield Job(replace(config, seed=seed), (*self.grid.overrides, *setting, f"seed={seed}"), setting)

    def outstanding(self, store: Store) -> list[Job]:
        """What can be run now: the missing runs of the tuning, and after it the missing runs of the cell."""
        tuning = [job for job in self.tuning(store).jobs if not store.has(job.name)]
        return tuning or [job for job in islice(self.final_runs(store), self.seeds) if not store.has(job.name)]

    def results(self, store: Store) -> list[Record]:
        """The records that fill the cell: those of its seeds, and more as far as they go on."""
        found = []
        for seed, job in enumerate(self.final_runs(store)):
            record = store.read(job.name)
            if record is not None:
                found.append(record)
            elif seed >= self.seeds:
                break
        return found


def studies(
    experiment: Experiment,
    budget: int = 0,
    selection: str = "val",
    extra: tuple[str, ...] = (),
    seeds: int | None = None,
) -> list[Study]:
    """A study for each cell; `budget` counts in the cell's own, 0 the paper's and -1 the shortest; `seeds` None: as
    many as the cell is to have.

    Raises ConfigError when `extra` says anything but where and how to run.
    """
    for override in extra:
        if override.partition("=")[0] not in PLACES:
            raise ConfigError(f"{override}: only where and how to run can be set: {', '.join(PLACES)}")
    compose(*extra)  # what is wrong with these is said once, not of every cell
    return [
        Study(
            cell,
            cell.epochs[budget:] if cell.epochs else (),
            seeds or cell.seeds or experiment.seeds,
            selection,
            extra,
            experiment.name,
        )
        for cell in experiment.cells
    ]
