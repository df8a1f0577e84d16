"""What the records say of an experiment: a number for each cell, and how it stands to the paper's and its rivals'."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from math import inf, isnan, nan

import numpy as np
from scipy.stats import ttest_ind

from experiments.records import Record, Store
from experiments.spec import Cell, Experiment, Measure
from experiments.study import Study

LEVEL = 0.05  # of significance
_study = cache(Study)  # a figure shows cells of the tables


@dataclass(frozen=True)
class Outcome:
    """A cell at the budget that is reported, and the records that fill it; none: it has not been run."""

    cell: Cell
    study: Study | None  # None: nothing on this dataset has been recorded, or the cell cannot be run
    records: list[Record]
    tuning: list[tuple[tuple[str, ...], Record]]  # the settings that have been run, in the order of the grid
    setting: tuple[str, ...]  # the hyperparameters that were chosen

    @property
    def failed(self) -> bool:
        return any(record.diverged for record in self.records)

    @property
    def epochs(self) -> int | None:
        """What the runs had, or would have in the paper; None where nothing was run and the dataset says it."""
        runs = self.records or [record for _, record in self.tuning]
        if runs:
            return int(runs[0].config["train"]["epochs"])
        return self.cell.epochs[0] if self.cell.epochs else None

    def values(self, measure: Measure) -> list[float]:
        """One for each seed; none of a cell that failed."""
        return [] if self.failed else [record.value(measure.key) for record in self.records]

    def mean(self, measure: Measure) -> float:
        return mean_and_error(self.values(measure))[0]

    def difference(self, measure: Measure) -> float:
        """Ours less the paper's; NaN where one of them is missing."""
        return self.mean(measure) - paper(self.cell)

    def marked(self, measure: Measure) -> bool:
        """Whether the difference exceeds both standard errors; one that is not known is not exceeded."""
        error = self.cell.paper.error if self.cell.paper else None
        if error is None:
            return False
        return abs(self.difference(measure)) > max(mean_and_error(self.values(measure))[1], error)


@dataclass(frozen=True)
class Comparison:
    """Of two rows in one column: a method, and its rival with LAWN."""

    panel: str
    column: str
    base: str
    rival: str
    gain: float  # of the rival's mean over the base's; negative where it is worse
    p: float  # Welch's test, two-sided; NaN with one seed, or without any spread
    paper: float  # the paper's gain; NaN where it has none

    @property
    def place(self) -> str:
        return place(self.panel, self.column)

    @property
    def turned(self) -> bool:
        """Whether the paper has the opposite sign."""
        return not isnan(self.paper) and (self.gain > 0) != (self.paper > 0)


def outcomes(experiment: Experiment, store: Store, selection: str = "val") -> list[Outcome]:
    """An outcome for each cell: the longest of its budgets that is filled, else that has any run."""
    return [_outcome(cell, store, selection, experiment.seeds) for cell in experiment.cells]


def _outcome(cell: Cell, store: Store, selection: str, seeds: int) -> Outcome:
    if not store.any_of(cell.value("dataset")):
        return Outcome(cell, None, [], [], ())
    found = []
    for budget in cell.epochs or (None,):
        study = _study(cell, budget, selection)
        if study.problem:
            continue
        recorded = [store.read(job.config) for job in study.tuning]
        tuning = [(s, record) for s, record in zip(study.settings, recorded, strict=True) if record is not None]
        index = study.chosen(store)
        setting = () if index is None else study.settings[index]
        found.append(Outcome(cell, study, study.results(store, seeds), tuning, setting))
    nothing = Outcome(cell, None, [], [], ())
    # The first of equals.
    return max(found, key=lambda o: (min(len(o.records), seeds), bool(o.tuning)), default=nothing)


def comparisons(experiment: Experiment, found: list[Outcome]) -> list[Comparison]:
    """Every pair of rows in every column where both have numbers, after the same number of epochs."""
    measure = experiment.measures[0]
    sign = -1 if measure.smaller_is_better else 1
    at = {(o.cell.panel, o.cell.column, o.cell.row): o for o in found if o.values(measure)}
    compared = []
    for panel, column in places(found):
        for base, rival in experiment.pairs:
            if not {(panel, column, base), (panel, column, rival)} <= set(at):
                continue
            a, b = at[panel, column, base], at[panel, column, rival]
            if a.epochs != b.epochs:
                continue
            gain = sign * (b.mean(measure) - a.mean(measure))
            p = welch(a.values(measure), b.values(measure))
            compared.append(Comparison(panel, column, base, rival, gain, p, sign * (paper(b.cell) - paper(a.cell))))
    return compared


def against_the_best(experiment: Experiment, found: list[Outcome]) -> list[str]:
    """How the rival stands to the best of the other rows, a sentence for each column that has both."""
    measure = experiment.measures[0]
    sign = -1 if measure.smaller_is_better else 1
    lines = []
    for panel, column in places(found):
        filled = [o for o in found if (o.cell.panel, o.cell.column) == (panel, column) and o.values(measure)]
        rival = next((o for o in filled if o.cell.row == experiment.rival), None)
        others = [o for o in filled if o is not rival]
        if rival is None or not others:
            continue
        best = max(others, key=lambda o: sign * o.mean(measure))
        (mean, error), (top, spread) = (mean_and_error(o.values(measure)) for o in (rival, best))
        gain = sign * (mean - top)
        within = "no standard error is known" if isnan(spread) else "within the latter's standard error"
        how = within if isnan(spread) or abs(gain) <= spread else "above it" if gain > 0 else "below it by more"
        switched = sorted(r.result["last"]["free_epochs"] for r in rival.records if "free_epochs" in r.result["last"])
        lines.append(
            f"{rival.cell.row} at {place(panel, column)}: {mean:.2f} ({error:.2f}), the best of the others, "
            f"{best.cell.row}, {top:.2f} ({spread:.2f}): {how}."
            + (f" Norms were fixed after {switched[0]:.2f} to {switched[-1]:.2f} epochs." if switched else "")
        )
    return lines


def verdict(experiment: Experiment, found: list[Outcome]) -> list[str]:
    """How the ranking stands to the paper's, in sentences; none where nothing can be compared."""
    if experiment.rival:
        return against_the_best(experiment, found)
    pairs = comparisons(experiment, found)
    lines = []
    if len(pairs) == 1:
        (c,) = pairs
        lines.append(f"{c.rival} against {c.base}: {c.gain:+.3g} (Welch's test over seeds: p = {c.p:.2g}).")
    elif pairs:
        ahead, behind = [c for c in pairs if c.gain > 0], [c for c in pairs if c.gain < 0]
        lines.append(
            f"With LAWN the number is better in {len(ahead)} of {len(pairs)} comparisons "
            f"(p < {LEVEL} in {sum(c.p < LEVEL for c in ahead)}) and worse in {len(behind)} "
            f"(p < {LEVEL} in {sum(c.p < LEVEL for c in behind)}); "
            "Welch's test over seeds, not corrected for their number."
        )
        printed = [c for c in pairs if not isnan(c.paper)]
        turned = "; ".join(
            f"{c.rival} against {c.base} at {c.place} (here {c.gain:+.3g}, p = {c.p:.2g}, paper {c.paper:+.3g})"
            for c in printed
            if c.turned
        )
        if printed:
            agree = sum(not c.turned for c in printed)
            lines.append(
                f"The sign is the paper's in {agree} of the {len(printed)} comparisons that it has"
                + (f"; opposite are: {turned}." if turned else ".")
            )
    return lines + _rankings(experiment, found)


def _rankings(experiment: Experiment, found: list[Outcome]) -> list[str]:
    """The order of the rows in each column where all of the paper's rows have been run; what failed comes last."""
    measure = experiment.measures[0]
    sign = 1 if measure.smaller_is_better else -1
    lines = []
    for panel, column in places(found):
        here = [o for o in found if (o.cell.panel, o.cell.column) == (panel, column) and o.cell.paper is not None]
        if len(here) < 3 or not all(o.records for o in here) or len({o.epochs for o in here}) > 1:
            continue
        ours = _order((o.cell.row, sign * o.mean(measure)) for o in here)
        theirs = _order((o.cell.row, sign * paper(o.cell)) for o in here)
        same = "as in the paper" if ours == theirs else f"in the paper {theirs}"
        lines.append(f"Order at {place(panel, column)}: {ours}; {same}.")
    return lines


def _order(rows: Iterable[tuple[str, float]]) -> str:
    return " > ".join(row for row, _ in sorted(rows, key=lambda row: inf if isnan(row[1]) else row[1]))


def places(found: Iterable[Outcome]) -> list[tuple[str, str]]:
    """The columns of a table, as panel and column, in the order of the cells."""
    return list(dict.fromkeys((outcome.cell.panel, outcome.cell.column) for outcome in found))


def place(panel: str, column: str) -> str:
    return ", ".join(filter(None, (panel, column)))


def paper(cell: Cell) -> float:
    """The paper's number; NaN where it has none or prints "Fail"."""
    return nan if cell.paper is None or cell.paper.value is None else cell.paper.value


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error of the mean; NaN where there are too few values."""
    array = np.asarray(values, float)
    mean = float(array.mean()) if len(array) else nan
    return mean, float(array.std(ddof=1) / np.sqrt(len(array))) if len(array) > 1 else nan


def welch(a: list[float], b: list[float]) -> float:
    """Two-sided p of Welch's test for a difference of means; NaN with a single value or without any spread."""
    if len(a) < 2 or len(b) < 2 or (np.ptp(a) == 0 and np.ptp(b) == 0):
        return nan
    return float(ttest_ind(a, b, equal_var=False).pvalue)
