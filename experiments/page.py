"""What is shown of an experiment: numbers as text, and the sentences that belong to them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isnan

import pandas as pd

from experiments.outcomes import Comparison, Outcome, comparisons, mean_and_error, outcomes, place, verdict
from experiments.records import Record, Store
from experiments.spec import Experiment, Measure


@dataclass(frozen=True)
class Entry:
    """What stands in one place of a table, as text."""

    ours: str  # "mean (standard error, n)", "Fail", or nothing
    paper: str  # the paper's number, "Fail", or nothing
    difference: str
    marked: bool
    records: list[Record]


@dataclass(frozen=True)
class Panel:
    title: str
    columns: list[str]
    rows: list[tuple[str, list[Entry]]]

    @property
    def filled(self) -> bool:
        return any(entry.ours for _, entries in self.rows for entry in entries)


@dataclass(frozen=True)
class Tuned:
    """How a cell's hyperparameters were chosen."""

    place: str
    row: str
    chosen: str
    value: str  # of the headline metric on the split of the selection; the best, then the median of those that ended
    runs: str
    edge: str  # hyperparameters whose chosen value is the last of the grid


class Page:
    """Everything that is shown of an experiment."""

    source: str | None = None  # numbers link to records of their own

    def __init__(self, experiment: Experiment, store: Store, selection: str = "val") -> None:
        self.experiment = experiment
        self.selection = selection
        self.name = experiment.name if selection == "val" else f"{experiment.name}-selected-on-{selection}"
        self.found = outcomes(experiment, store, selection)

    @property
    def panels(self) -> list[Panel]:
        """The table, a panel for each dataset; its columns are those of the cells, or else the measures."""
        panels = []
        measures = self.experiment.measures
        for title in dict.fromkeys(outcome.cell.panel for outcome in self.found):
            cells = [outcome for outcome in self.found if outcome.cell.panel == title]
            columns = list(dict.fromkeys(outcome.cell.column for outcome in cells))
            heads = [
                measure.title if not column else f"{column}{_epochs(cells, column)}"
                for column in columns
                for measure in measures
            ]
            at = {(outcome.cell.row, outcome.cell.column): outcome for outcome in cells}
            rows = [
                (row, [self._entry(at[row, column], measure, cells) for column in columns for measure in measures])
                for row in dict.fromkeys(outcome.cell.row for outcome in cells)
            ]
            panels.append(Panel(title, heads, rows))
        return panels

    def _entry(self, outcome: Outcome, measure: Measure, cells: list[Outcome]) -> Entry:
        """The records stand with the first measure; the epochs, where they are not the same in the whole column."""
        shown = entry(outcome, measure)
        if measure is not self.experiment.measures[0]:
            shown = replace(shown, records=[])
        column = {o.epochs for o in cells if o.records and o.cell.column == outcome.cell.column}
        if outcome.records and len(column) > 1:
            shown = replace(shown, ours=f"{shown.ours} after {outcome.epochs} epochs")
        return shown

    @property
    def comparisons(self) -> list[Comparison]:
        return comparisons(self.experiment, self.found)

    @property
    def verdict(self) -> list[str]:
        return verdict(self.experiment, self.found)

    @property
    def measured(self) -> str:
        """What the numbers are, in a sentence or two."""
        measures = self.experiment.measures
        shown = f"{measures[0].title}: mean" if len(measures) == 1 else "Mean"
        shown = f"{shown[0].upper()}{shown[1:]} (standard error, number of seeds) at the last epoch{self._budget}"
        if not any(cell.sweep for cell in self.experiment.cells):
            return f"{shown}."
        chosen = (
            "chosen on the validation split (the best of a grid, one run with seed 0 for each setting)"
            if self.selection == "val"
            else "chosen on the TEST split (the best of a grid, one run with seed 0 for each setting), as the paper "
            "most likely did: the numbers are biased upwards"
        )
        return f"{shown}; hyperparameters {chosen}."

    @property
    def _budget(self) -> str:
        """The epochs, where no column says them."""
        epochs = sorted({o.epochs for o in self.found if o.records and not o.cell.column and o.epochs is not None})
        return f" of {' or '.join(map(str, epochs))}" if epochs else ""

    @property
    def marks(self) -> str:
        """What the marks beside differences mean; nothing where the paper has no numbers."""
        printed = [outcome.cell.paper for outcome in self.found if outcome.cell.paper is not None]
        if not printed:
            return ""
        if not any(paper.error for paper in printed):
            return (
                "Below ours stand the paper's number and the difference. The paper gives no standard errors here, so "
                "none is marked."
            )
        return "Below ours stand the paper's number and the difference, with * where it exceeds both standard errors."

    @property
    def tuned(self) -> list[Tuned]:
        return [_tuned(outcome) for outcome in self.found if outcome.setting]

    @property
    def grids(self) -> list[str]:
        """The settings that were tried, a line for each preset."""
        lines = {}
        for outcome in self.found:
            if outcome.tuning and outcome.study is not None:
                axes = {axis: ", ".join(map(_plain, values)) for axis, values in outcome.study.axes.items()}
                key = (outcome.cell.sweep, outcome.epochs)
                lines[key] = f"`sweep={outcome.cell.sweep}`, {outcome.epochs} epochs: " + "; ".join(
                    f"{axis} {values}" for axis, values in axes.items()
                )
        return list(lines.values())

    @property
    def records(self) -> list[Record]:
        return [record for outcome in self.found for record in outcome.records]

    @property
    def warnings(self) -> dict[str, list[str]]:
        """Warnings of the runs, and the cells that they are of."""
        warned: dict[str, list[str]] = {}
        for outcome in self.found:
            for warning in dict.fromkeys(w for record in outcome.records for w in record.result["warnings"]):
                warned.setdefault(warning, []).append(outcome.cell.name)
        return warned

    @property
    def provenance(self) -> str:
        return provenance(self.records, [record for outcome in self.found for _, record in outcome.tuning])

    @property
    def figured(self) -> bool:
        return self.experiment.figure is not None


def provenance(records: list[Record], tuning: Sequence[Record] = ()) -> str:
    """Code versions and hardware, in a line."""
    found = [environment for record in records for environment in record.environments]
    if not found:
        return "Nothing of it has been run."
    machines = sorted({e["device"] if e["device"] != "cpu" else f"{e['cores']}-core {e['cpu']}" for e in found})
    packages = sorted({f"torch {e['packages']['torch']}" for e in found})
    chosen = f", after {len(tuning)} that chose the hyperparameters, {_code(tuning)}" if tuning else ""
    runs = f"{len(records)} run{'s' if len(records) > 1 else ''}"
    return f"{runs}, {_code(records)}{chosen}; {', '.join(packages)}; {', '.join(machines)}."


def entry(outcome: Outcome, measure: Measure) -> Entry:
    printed = outcome.cell.paper
    form = _form(measure.digits)
    difference = outcome.difference(measure)
    return Entry(
        ours="Fail" if outcome.failed else show(outcome.values(measure), measure.digits),
        paper="" if printed is None else "Fail" if printed.value is None else f"{printed.value:{form}}",
        difference="" if isnan(difference) else f"{difference:+{form}}",
        marked=outcome.marked(measure),
        records=outcome.records,
    )


def show(values: list[float], digits: int) -> str:
    """'mean (standard error, n)', or 'mean (n=1)' of a single value, or '' of none."""
    if not values:
        return ""
    (mean, error), form = mean_and_error(values), _form(digits)
    return f"{mean:{form}} (n=1)" if isnan(error) else f"{mean:{form}} ({error:{form}}, n={len(values)})"


def _form(digits: int) -> str:
    return f".{digits}f" if digits >= 0 else f".{-digits - 1}e"


def _epochs(cells: list[Outcome], column: str) -> str:
    """What is said of a column's budget, where the cells have one."""
    here = [o for o in cells if o.cell.column == column and o.cell.epochs]
    run = sorted({o.epochs for o in here if o.records and o.epochs is not None})
    paper = max((o.cell.epochs[0] for o in here), default=0)
    return f"; {' and '.join(map(str, run))} of {paper} epochs" if run else f"; {paper} epochs" if paper else ""


def _code(records: Sequence[Record]) -> str:
    """The versions of the code, the most frequent first, and how many of the runs are of each."""
    versions = Counter(record.code for record in records).most_common()
    if len(versions) == 1:
        return f"code {versions[0][0]}"
    return "code " + ", ".join(f"{version} ({count})" for version, count in versions)


def _tuned(outcome: Outcome) -> Tuned:
    assert outcome.study is not None
    scores = pd.Series([record.value("headline") for _, record in outcome.tuning])
    axes = outcome.study.axes
    chosen = dict(override.split("=", 1) for override in outcome.setting)
    edge = [key for key, value in chosen.items() if len(axes[key]) > 1 and value in (axes[key][0], axes[key][-1])]
    diverged = int(scores.isna().sum())
    return Tuned(
        place=place(outcome.cell.panel, outcome.cell.column),
        row=outcome.cell.row,
        chosen=", ".join(f"{key.split('.')[1]} {_plain(value)}" for key, value in chosen.items()),
        value="" if scores.isna().all() else f"{scores.max():.2f}; {scores.median():.2f}",
        runs=f"{len(scores)}" + (f", {diverged} diverged" if diverged else ""),
        edge=", ".join(key.split(".")[1] for key in edge),
    )


def _plain(number: str) -> str:
    return f"{float(number):g}"
