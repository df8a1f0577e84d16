"""What is shown of an experiment: numbers as text, and the sentences that belong to them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import isnan

import pandas as pd

from experiments.definitions.spec import Experiment, Measure
from experiments.records import Record, Store
from experiments.reporting import tuned
from experiments.reporting.layout import Entry, Panel, Table, form, show, signed
from experiments.reporting.outcomes import Outcome, Pair, comparisons, method, outcomes, paper, summary
from experiments.reporting.statistics import mean_and_error


class Page:
    """Everything that is shown of an experiment."""

    source: str | None = None  # where all numbers are from; None: they link to records of their own
    source_title = "The record"

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
    def frame(self) -> pd.DataFrame:
        """The experiment as tidy data: a row for each cell and measure."""
        rows = []
        for outcome in self.found:
            for measure in self.experiment.measures:
                values = outcome.values(measure)
                mean, error = mean_and_error(values)
                printed = outcome.cell.paper
                rows.append(
                    {
                        "panel": outcome.cell.panel,
                        "column": outcome.cell.column,
                        "row": outcome.cell.row,
                        "measure": measure.title,
                        "status": "fail" if outcome.failed else "done" if values else "not run",
                        "epochs": outcome.epochs,
                        "paper_epochs": outcome.cell.epochs[0] if outcome.cell.epochs else None,
                        "n": len(values),
                        "mean": mean,
                        "standard_error": error,
                        "paper": paper(outcome.cell),
                        "paper_fails": printed is not None and printed.value is None,
                        "paper_standard_error": printed.error if printed else None,
                        "difference": outcome.difference(measure),
                        "exceeds_both_errors": outcome.marked(measure),
                        "setting": " ".join(outcome.setting),
                        "records": " ".join(record.name for record in outcome.records),
                        "code": "; ".join(dict.fromkeys(record.code for record in outcome.records)),
                    }
                )
        return pd.DataFrame(rows)

    @property
    def comparisons(self) -> Table | None:
        """With LAWN and without, a row for each column that has both."""
        pairs = comparisons(self.experiment, self.found)
        return Table(COMPARED, [_compared(pair) for pair in pairs]) if pairs else None

    @property
    def compared(self) -> str:
        """What the comparisons are, in a sentence or two."""
        return (
            f"By {method(comparisons(self.experiment, self.found))}. An interval holds the true difference with 95 % "
            "probability, by itself; Holm's correction is over this table. Detectable is the true difference that as "
            "many seeds show with 80 % probability, without a correction."
        )

    @property
    def summary(self) -> list[str]:
        return summary(self.experiment, self.found)

    @property
    def measured(self) -> str:
        """What the numbers are, in a sentence or two."""
        measures = self.experiment.measures
        shown = f"{measures[0].title}: mean" if len(measures) == 1 else "Mean"
        shown = f"{shown[0].upper()}{shown[1:]} (standard error, number of seeds) at the last epoch{self._budget}"
        chosen = tuned.protocol(self.selection) if any(cell.sweep for cell in self.experiment.cells) else ""
        return f"{shown}. {chosen}".rstrip()

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
    def tuned(self) -> Table | None:
        return tuned.table(self.found)

    @property
    def grids(self) -> list[str]:
        return tuned.grids(self.found)

    @property
    def tuning(self) -> pd.DataFrame:
        return tuned.frame(self.found)

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
        return provenance(self.records, [record for outcome in self.found for _, record in outcome.tried])

    @property
    def shown(self) -> bool:
        """Whether there is anything to show."""
        return bool(self.records)

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
    text = form(measure.digits)
    difference = outcome.difference(measure)
    return Entry(
        ours="Fail" if outcome.failed else show(outcome.values(measure), measure.digits),
        paper="" if printed is None else "Fail" if printed.value is None else f"{printed.value:{text}}",
        difference="" if isnan(difference) else f"{difference:+{text}}",
        marked=outcome.marked(measure),
        records=outcome.records,
    )


COMPARED = ("", "", "gain with LAWN", "95 % interval", "p", "p, Holm", "detectable", "seeds", "the paper's gain")


def _compared(pair: Pair) -> list[str]:
    low, high = pair.gain.interval()
    known = not isnan(pair.gain.p)
    return [
        pair.place,
        f"{pair.base} → {pair.rival}",
        signed(pair.gain.difference),
        f"{signed(low)} to {signed(high)}" if known else "",
        f"{pair.gain.p:.2g}" if known else "",
        f"{pair.adjusted:.2g}" if known else "",
        f"{pair.gain.detectable():.2g}" if known else "",
        f"{pair.seeds[0]}, {pair.seeds[1]}",
        signed(pair.paper),
    ]


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
