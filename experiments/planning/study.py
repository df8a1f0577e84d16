"""Studies: a cell at a budget of epochs, with the runs that tune its hyperparameters and its final runs.

Tuning follows `search`, on the validation split. The final runs use the chosen setting with every seed, on the test
split. The next runs follow from the records alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import count, islice

from experiments.definitions.spec import Cell, Experiment
from experiments.planning import search
from experiments.planning.grid import Grid, Job
from experiments.planning.search import Point
from experiments.record import Record
from experiments.records import Store
from lawn.composition import compose_many
from lawn.config import EvalConfig
from lawn.errors import ConfigError
from lawn.identity import NOT_IDENTITY

SELECTIONS = ("val", "test")
CONFIRMING = search.BEST * len(search.CONFIRMING_SEEDS)  # runs, if none of the best loses
SET_BY_RUNNER = ("device", "run_dir", "train.devices", "train.vectorize", "logger.name")
SETTABLE = ("logger", *(key for key in NOT_IDENTITY if key not in SET_BY_RUNNER))  # by --set


@dataclass(frozen=True)
class Tuning:
    """The state of a study's tuning."""

    short: list[Job] = field(default_factory=list)  # the grid with a shorter budget
    full: list[Job] = field(default_factory=list)  # with the whole budget and seed 0, in the order of the search
    confirming: list[Job] = field(default_factory=list)  # the best of `full` with other seeds
    unknown: int = 0  # estimated number of further runs with the whole budget
    chosen: Point | None = None

    @property
    def jobs(self) -> list[Job]:
        return [*self.short, *self.full, *self.confirming]


class Study:
    """A cell at a budget.

    `budgets` are the epochs, and optionally those of a shorter schedule to search on; without them the dataset's
    default holds. `extra` overrides set where and how to run; `experiment` names the files of the records.
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
        self.experiment = experiment
        self.budget = budgets[0] if budgets else None
        self.seeds = 0 if cell.grid_only else seeds
        self._ranked = ("eval.candidates=all",) if cell.all_items else ()  # an override of final runs
        epochs = () if self.budget is None else (f"train.epochs={self.budget}",)
        self.grid = Grid((*cell.overrides, *epochs), cell.sweep, selection, extra, experiment)
        self.shorter: Grid | None = None
        if len(budgets) > 1 and cell.sweep is not None and not (cell.grid_only or cell.whole_grid):
            overrides = (*cell.overrides, f"train.epochs={budgets[-1]}")
            self.shorter = Grid(overrides, cell.sweep, selection, extra, experiment)

    @property
    def problem(self) -> str | None:
        """Why the cell cannot be run; None if it can."""
        return self.grid.problem or (self.shorter.problem if self.shorter is not None else None)

    def tuning(self, store: Store) -> Tuning:
        """The runs that tune the hyperparameters, as far as they follow from the records."""
        if self.problem or not self.grid.points:
            return Tuning()
        if self.cell.grid_only:
            return Tuning(full=self.grid.jobs())
        start, short, limit = self.grid.points, [], None
        if self.shorter is not None:
            shorter, short, limit = self.shorter, self.shorter.jobs(), search.num_trials(len(self.grid.axes))
            if not all(store.has(job.name) for job in short):
                return Tuning(short, unknown=limit + CONFIRMING)
            start = search.ranked(start, lambda point: shorter.score(store, point))
        return replace(self._search(store, start, limit), short=short)

    def _search(self, store: Store, start: list[Point], limit: int | None) -> Tuning:
        """The search over at most `limit` points, beginning with the first of `start`; see `search.points_to_try`."""

        def score(point: Point) -> float | None:
            return self.grid.score(store, point)

        def scores(point: Point) -> list[float | None]:
            return [self.grid.score(store, point, seed) for seed in (0, *search.CONFIRMING_SEEDS)]

        def known(point: Point) -> list[float]:
            return [value for value in scores(point) if value is not None]

        updates = cache(lambda: self._updates_per_epoch(store))  # known where a point is asked for

        def possible(point: Point) -> bool:
            per_epoch = updates()
            repeated = per_epoch is not None and self.grid.is_repeated(point, per_epoch)
            return self.grid.job(point) is not None and not repeated

        tried = search.points_to_try(self.grid.shape, start, limit, score, possible)
        full = self.grid.jobs(tried)
        if any(score(point) is None for point in tried):
            return Tuning(full=full, unknown=max(0, (limit or len(start)) - len(full)) + CONFIRMING)
        confirmed = search.points_to_confirm(search.ranked(tried, score), scores)
        confirming = self.grid.jobs(confirmed, search.CONFIRMING_SEEDS)
        done = all(None not in scores(point) for point in confirmed)
        return Tuning([], full, confirming, 0, search.best_point(confirmed, known) if done else None)

    def _updates_per_epoch(self, store: Store) -> int | None:
        """That of the records of the grid; None if no run has finished an epoch."""
        for job in self.grid.jobs():
            record = store.read(job.name)
            if record is not None and not record.diverged:
                return int(record.result["last"]["step"] // record.result["last"]["epoch"])
        return None

    def final_runs(self, store: Store) -> Iterator[Job]:
        """The final runs of the cell, for the seeds 0, 1, ... without end; none before the tuning has ended."""
        if self.problem or self.cell.grid_only:
            return
        setting: tuple[str, ...] = ()
        config = self.grid.config
        if self.cell.sweep is not None:
            chosen = self.tuning(store).chosen
            job = None if chosen is None else self.grid.job(chosen)
            if job is None:
                return
            setting = job.setting
            config = job.config
        config = replace(config, eval=self._final_eval)
        for seed in count():
            overrides = (*self.grid.overrides, *setting, *self._ranked, f"seed={seed}")
            yield Job(replace(config, seed=seed), overrides, setting, self.experiment)

    @cached_property
    def _final_eval(self) -> EvalConfig:
        """What the overrides of final runs say of the evaluation, and not the sweep preset."""
        return compose_many(*self.grid.overrides, *self._ranked).config.eval

    def missing(self, store: Store) -> tuple[list[Job], int]:
        """The missing runs that can start now, and the expected number of those that depend on their results.

        First the runs of the tuning, after it the final ones.
        """
        if self.problem:
            return [], 0
        tuning = self.tuning(store)
        jobs = [job for job in tuning.jobs if not store.has(job.name)]
        if tuning.chosen is None and self.grid.points:
            return jobs, tuning.unknown + self.seeds
        return [job for job in islice(self.final_runs(store), self.seeds) if not store.has(job.name)], 0

    def outstanding(self, store: Store) -> list[Job]:
        """The missing runs that can start now."""
        return self.missing(store)[0]

    def results(self, store: Store) -> list[Record]:
        """The records of the final runs: those of the study's seeds, and consecutive further ones."""
        found = []
        for seed, job in enumerate(self.final_runs(store)):
            record = store.read(job.name)
            if record is not None:
                found.append(record)
            elif seed >= self.seeds:
                break
        return found


def check_settable(overrides: Sequence[str]) -> None:
    """Raises ConfigError for an override of a key that names another run."""
    for override in overrides:
        if override.partition("=")[0] not in SETTABLE:
            raise ConfigError(f"{override}: only where and how to run can be set: {', '.join(SETTABLE)}")


def studies(
    experiment: Experiment,
    budget: int = 0,
    selection: str = "val",
    extra: tuple[str, ...] = (),
    seeds: int | None = None,
) -> list[Study]:
    """A study for each cell. `budget` indexes the cell's budgets: 0 is the paper's, -1 the shortest.

    `seeds` overrides the number of final runs. Raises ConfigError if `extra` sets a key that names another run.
    """
    check_settable(extra)
    _ = compose_many(*extra).checked  # so that an error in them is reported once, not for every cell
    return [
        Study(
            cell,
            cell.budgets(budget),
            seeds or cell.seeds or experiment.seeds,
            selection,
            extra,
            experiment.name,
        )
        for cell in experiment.cells
    ]
