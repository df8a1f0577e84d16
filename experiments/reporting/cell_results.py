"""The result of each cell of an experiment, from the records, and comparisons between them."""

import json
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import isnan, nan

import numpy as np

from experiments.definitions.spec import Cell, Experiment, Measure
from experiments.planning.grid import Job
from experiments.planning.study import Study, Tuning
from experiments.record import Record
from experiments.records import Store
from experiments.reporting.statistics import Comparison, compare, compare_paired, holm, mean_and_error
from lawn.data.fingerprint import differences

FAR = 5  # points

_study = cache(Study)  # a figure shows cells of the tables


@dataclass(frozen=True)
class CellResult:
    """A cell at its reported budget, with the records of its final runs."""

    cell: Cell
    study: Study | None  # None: no record of this dataset, or the cell cannot be run
    records: list[Record]
    tuning: Tuning
    tried: list[tuple[Job, Record]]  # the recorded runs of the tuning

    @property
    def failed(self) -> bool:
        return any(record.diverged for record in self.records)

    @property
    def epochs(self) -> int | None:
        """The epochs of the runs, or else of the paper; None if neither is known."""
        if self.records:
            return int(self.records[0].config["train"]["epochs"])
        return self.cell.epochs[0] if self.cell.epochs else None

    @property
    def setting(self) -> tuple[str, ...]:
        """The chosen hyperparameters; empty if nothing is tuned or the tuning has not ended."""
        chosen = self.tuning.chosen
        job = None if self.study is None or chosen is None else self.study.grid.job(chosen)
        return () if job is None else job.setting

    def values(self, measure: Measure) -> list[float]:
        """A value for each seed; empty for a cell that failed."""
        return [] if self.failed else [record.value(measure.key) for record in self.records]

    def mean(self, measure: Measure) -> float:
        return mean_and_error(self.values(measure))[0]

    def difference(self, measure: Measure) -> float:
        """Our mean minus the paper's number; NaN if one of them is missing."""
        return self.mean(measure) - paper(self.cell)

    def marked(self, measure: Measure) -> bool:
        """Whether the difference exceeds both standard errors; False if the paper gives none."""
        error = self.cell.paper.error if self.cell.paper else None
        if error is None:
            return False
        return abs(self.difference(measure)) > max(mean_and_error(self.values(measure))[1], error)


@dataclass(frozen=True)
class Pair:
    """Two rows of one column: a method, and its rival with LAWN."""

    panel: str
    column: str
    base: str
    rival: str
    gain: Comparison  # of the rival's mean over the base's; negative where it is worse
    seeds: tuple[int, int]  # of the base and of the rival
    paired: bool  # over the same samples of the test split; else over seeds alone
    adjusted: float  # p after Holm's correction over the table; NaN where there is no p
    paper: float  # the paper's gain; NaN where it has none
    epochs: int | None = None  # of the runs
    paper_epochs: int | None = None
    differences: tuple[float, float] = (nan, nan)  # of both from the paper's, signed as `gain`; NaN within the errors
    runs: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())  # the names of those of the base and of the rival
    far: tuple[int, int] = (0, 0)  # the seeds of both that are far below their median, see `far_seeds`

    @property
    def key(self) -> Hashable:
        """Equal for comparisons of the same runs."""
        return self.runs, self.gain

    @property
    def place(self) -> str:
        return place(self.panel, self.column)

    @property
    def loser(self) -> tuple[str, float]:
        """The row that is worse, and its difference from the paper's number."""
        worse = int(self.gain.difference < 0)
        return (self.base, self.rival)[worse], self.differences[worse]

    @property
    def winner(self) -> tuple[str, float]:
        """The other row, and its difference."""
        better = int(self.gain.difference >= 0)
        return (self.base, self.rival)[better], self.differences[better]

    @property
    def sign(self) -> int:
        """1 if the gain has the sign of the paper's, -1 if it has the opposite; 0 if one of them is 0 or missing."""
        product = self.gain.difference * self.paper
        return (product > 0) - (product < 0)


def cell_results(experiment: Experiment, store: Store, selection: str = "val") -> list[CellResult]:
    """A result for each cell, at the longest of its budgets with all final runs, or else with the most runs."""
    recorded = store.kinds()
    return [_cell_result(cell, store, recorded, selection, cell.seeds or experiment.seeds) for cell in experiment.cells]


def _cell_result(
    cell: Cell, store: Store, recorded: frozenset[tuple[str, ...]], selection: str, seeds: int
) -> CellResult:
    """`recorded`: the store's kinds; to look there is much faster than to compose the runs of a cell without any."""
    nothing = CellResult(cell, None, [], Tuning(), [])
    given = dict(override.split("=", 1) for override in cell.overrides)
    size = given.get("train.batch_size", "")
    kind = given["dataset"], given.get("optim"), size if size.isdecimal() else None  # not 10_000
    like = {epochs for *others, epochs in recorded if all(a in (None, b) for a, b in zip(kind, others, strict=True))}
    found = []
    for budgets in [cell.budgets(k) for k in range(len(cell.epochs))] or [()]:
        if not (like.intersection(map(str, budgets)) if budgets else like):
            continue
        study = _study(cell, budgets, seeds, selection)
        if study.problem:
            continue
        tuning = study.tuning(store)
        tried = [(job, record) for job in tuning.jobs if (record := store.read(job.name)) is not None]
        found.append(CellResult(cell, study, study.results(store), tuning, tried))
    return _reported(found, seeds) if found else nothing


def _reported(found: Sequence[CellResult], seeds: int) -> CellResult:
    """The first with all final runs, of results in the order of the budgets, or else that with the most runs."""
    complete = (result for result in found if len(result.records) >= seeds)
    return next(complete, None) or max(found, key=lambda o: (len(o.records), len(o.tried)))  # the first of equals


def comparisons(experiment: Experiment, found: list[CellResult]) -> list[Pair]:
    """All pairs of rows with numbers in a column, after the same number of epochs.

    Holm's correction counts the comparison of the same runs under several names once.
    """
    measure = experiment.measures[0]
    at = {(o.cell.panel, o.cell.column, o.cell.row): o for o in found if o.values(measure)}
    compared = []
    for panel, column in places(found):
        for base, rival in experiment.pairs:
            if not {(panel, column, base), (panel, column, rival)} <= set(at):
                continue
            a, b = at[panel, column, base], at[panel, column, rival]
            if a.epochs != b.epochs or not same_data([*a.records, *b.records]):
                continue
            difference, paired = gain(a, b, measure)
            compared.append(
                Pair(
                    panel=panel,
                    column=column,
                    base=base,
                    rival=rival,
                    gain=difference,
                    seeds=(len(a.records), len(b.records)),
                    paired=paired,
                    adjusted=nan,
                    paper=measure.sign * (paper(b.cell) - paper(a.cell)),
                    epochs=b.epochs,
                    paper_epochs=b.cell.epochs[0] if b.cell.epochs else None,
                    differences=(
                        measure.sign * _marked_difference(a, measure),
                        measure.sign * _marked_difference(b, measure),
                    ),
                    runs=(tuple(record.name for record in a.records), tuple(record.name for record in b.records)),
                    far=(far_seeds(a), far_seeds(b)),
                )
            )
    tested = {pair.key: pair.gain.p for pair in compared if not isnan(pair.gain.p)}
    adjusted = dict(zip(tested, holm([*tested.values()]), strict=True))
    return [replace(pair, adjusted=adjusted.get(pair.key, nan)) for pair in compared]


def far_seeds(result: CellResult) -> int:
    """How many seeds end more than FAR points of the headline metric below the median of the cell's."""
    values = [record.headline for record in result.records]
    return sum(bool(value < np.median(values) - FAR) for value in values)


def same_data(records: Sequence[Record]) -> bool:
    """Whether runs have read the same data and have outcomes of as many samples, as far as their records tell."""
    read = [data for record in records if (data := record.data)]
    sizes = {len(found) for record in records if (found := record.outcomes) is not None}
    return len(sizes) < 2 and not any(differences(read[0], data) for data in read)


def other_data(records: Iterable[Record]) -> dict[str, list[str]]:
    """A warning for each run that has read other data than most of the same dataset, configuration and split."""
    alike: dict[str, list[Record]] = {}
    for record in records:
        if record.data:
            kind = json.dumps([record.config["dataset"], record.result["split"]], sort_keys=True)
            alike.setdefault(kind, []).append(record)
    warnings = {}
    for group in alike.values():
        usual = json.loads(Counter(json.dumps(record.data, sort_keys=True) for record in group).most_common(1)[0][0])
        for record in group:
            own = {key: value for key, value in record.data.items() if usual.get(key, value) != value}
            if own:
                apart = ", ".join(f"{key} {value}, not {usual[key]}" for key, value in own.items())
                warnings[record.name] = [f"runs that read other data than most are not compared with them: {apart}"]
    return warnings


def _marked_difference(result: CellResult, measure: Measure) -> float:
    """The difference from the paper's number; NaN if it is within a standard error, ours or, if given, the paper's."""
    difference, (_, error) = result.difference(measure), mean_and_error(result.values(measure))
    printed = result.cell.paper.error if result.cell.paper else None
    return difference if abs(difference) > max(error, printed or 0.0) else nan


def gain(base: CellResult, rival: CellResult, measure: Measure) -> tuple[Comparison, bool]:
    """The gain of the rival; paired over test samples if the records have their outcomes, and whether it is."""
    arms = [[record.scores for record in result.records] for result in (rival, base)]
    known = measure.key == "headline" and all(scores is not None for arm in arms for scores in arm)
    if known and min(map(len, arms)) > 1:
        ours, theirs = (np.stack([scores for scores in arm if scores is not None]) for arm in arms)
        return compare_paired(ours, theirs), True
    return compare(*(measure.sign * np.asarray(result.values(measure)) for result in (rival, base))), False


def places(found: Iterable[CellResult]) -> list[tuple[str, str]]:
    """The columns of a table, as panel and column, in the order of the cells."""
    return list(dict.fromkeys((result.cell.panel, result.cell.column) for result in found))


def at_place(found: Iterable[CellResult], panel: str, column: str) -> list[CellResult]:
    """The results of the cells in a column of a table."""
    return [o for o in found if (o.cell.panel, o.cell.column) == (panel, column)]


def place(panel: str, column: str) -> str:
    return ", ".join(filter(None, (panel, column)))


def paper(cell: Cell) -> float:
    """The paper's number; NaN where it has none or prints "Fail"."""
    return nan if cell.paper is None or cell.paper.value is None else cell.paper.value
