"""The content of a page, and the builder for tables and figures."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isnan

import pandas as pd

from experiments.definitions.spec import Experiment, Measure
from experiments.record import Record
from experiments.records import Store
from experiments.reporting import tuning_tables
from experiments.reporting.cell_results import CellResult, Pair, cell_results, comparisons, other_data, paper
from experiments.reporting.charts import CHARTS, Chart
from experiments.reporting.drawing import Drawing, draw
from experiments.reporting.layout import (
    Entry,
    Panel,
    Table,
    format_interval,
    format_mean,
    format_signed,
    number_format,
)
from experiments.reporting.sentences import method, summary
from experiments.reporting.statistics import mean_and_error
from lawn.diagnostics import figure as diagnostics

SPREAD = "(standard error, number of seeds)"  # what follows a mean in the pages and tables


@dataclass(frozen=True)
class Page:
    """The content of the page of an experiment or a simulation."""

    name: str  # of its files
    title: str
    notes: Sequence[str]
    panels: list[Panel]
    measured: str  # what the numbers are, in a sentence or two
    provenance: str  # code versions and hardware, in a line
    summary: list[str]  # what the numbers show, in sentences
    frame: pd.DataFrame  # the numbers as tidy data
    chart: Chart | None = None
    figure: Drawing | None = None  # of the chart, or of what no chart describes
    figure_shown: bool = True  # in the index
    source: str | None = None  # the file of all numbers; None: each number links to its records
    source_title: str = "The record"
    marks: str = ""  # what the marks beside differences mean; empty where the paper has no numbers
    warnings: Mapping[str, list[str]] = field(default_factory=dict)  # of the runs, with the cells that they are of
    comparisons: Table | None = None  # with LAWN and without
    compared: str = ""  # what the comparisons are
    literature: Table | None = None  # the numbers of others
    of_literature: str = ""  # what they are
    tuned: Table | None = None  # the chosen hyperparameters
    grids: Sequence[str] = ()
    by_value: Table | None = None  # the best score at each value of a hyperparameter
    tuning: pd.DataFrame = field(default_factory=pd.DataFrame)  # the runs that chose them
    experiment: Experiment | None = None  # None: a simulation
    cell_results: Sequence[CellResult] = ()
    pairs: Sequence[Pair] = ()  # the comparisons


def experiment_page(experiment: Experiment, store: Store, selection: str = "val") -> Page:
    """The page of a table or figure."""
    found = cell_results(experiment, store, selection)
    records = [record for result in found for record in result.records]
    pairs = comparisons(experiment, found)
    tuned = [] if experiment.of_tables else found
    return Page(
        name=page_name(experiment, selection),
        title=page_title(experiment, selection),
        notes=experiment.notes,
        panels=panels(experiment, found, experiment_entry(experiment)),
        measured=_measured(experiment, found, selection),
        provenance=provenance(records, [record for result in found if result.records for _, record in result.tried]),
        summary=summary(experiment, found),
        frame=_frame(experiment, found),
        chart=(chart := chart_of(experiment, found)),
        figure=figure_of(experiment, chart, found),
        figure_shown=bool(records),
        marks=_marks(found),
        warnings=_warnings(found),
        comparisons=Table(COMPARED, [_compared(pair) for pair in pairs]) if pairs else None,
        compared=_compared_by(pairs),
        tuned=tuning_tables.table(tuned),
        grids=tuning_tables.grids(tuned),
        tuning=tuning_tables.frame(tuned),
        experiment=experiment,
        cell_results=found,
        pairs=pairs,
    )


def page_name(experiment: Experiment, selection: str) -> str:
    return experiment.name if selection == "val" else f"{experiment.name}-selected-on-{selection}"


def page_title(experiment: Experiment, selection: str) -> str:
    tuned = any(cell.sweep for cell in experiment.cells)
    return experiment.title + ("; settings scored on the TEST split" if tuned and selection == "test" else "")


def chart_of(experiment: Experiment, found: list[CellResult]) -> Chart | None:
    """The experiment's chart; None if it has no figure, or one that is not a chart."""
    make = CHARTS.get(experiment.figure or "")
    return None if make is None else make(experiment, found)


def figure_of(experiment: Experiment, chart: Chart | None, found: list[CellResult]) -> Drawing | None:
    """The experiment's figure, if it has one: its chart, or what `diagnostics=on` measures in each cell's first run."""
    if chart is not None:
        return Drawing(draw, chart)
    if experiment.figure is None:
        return None
    return Drawing(diagnostics.draw, {o.cell.row: o.records[0].history for o in found if o.records})


EntryOf = Callable[[CellResult, Measure, list[CellResult]], Entry]


def panels(experiment: Experiment, found: list[CellResult], entry_of: EntryOf) -> list[Panel]:
    """The table, a panel for each dataset; its columns are those of the cells, or else the measures."""
    made = []
    for title in dict.fromkeys(result.cell.panel for result in found):
        cells = [result for result in found if result.cell.panel == title]
        columns = list(dict.fromkeys(result.cell.column for result in cells))
        heads = [
            measure.title if not column else f"{column}{_epochs(cells, column)}"
            for column in columns
            for measure in experiment.measures
        ]
        at = {(result.cell.row, result.cell.column): result for result in cells}
        rows = [
            (
                row,
                [
                    replace(entry_of(at[row, column], measure, cells), result=at[row, column], measure=measure)
                    if (row, column) in at
                    else Entry("")
                    for column in columns
                    for measure in experiment.measures
                ],
            )
            for row in dict.fromkeys(result.cell.row for result in cells)
        ]
        made.append(Panel(title, heads, rows))
    return made


def experiment_entry(experiment: Experiment) -> EntryOf:
    """The records stand with the first measure; the epochs, if they differ within the column."""

    def entry_of(result: CellResult, measure: Measure, cells: list[CellResult]) -> Entry:
        shown = entry(result, measure)
        if measure is not experiment.measures[0]:
            shown = replace(shown, records=[])
        column = {o.epochs for o in cells if o.records and o.cell.column == result.cell.column}
        if result.records and len(column) > 1:
            shown = replace(shown, ours=f"{shown.ours} after {result.epochs} epochs")
        return shown

    return entry_of


def _frame(experiment: Experiment, found: list[CellResult]) -> pd.DataFrame:
    """A row for each cell and measure."""
    rows = []
    for result in found:
        for measure in experiment.measures:
            values = result.values(measure)
            mean, error = mean_and_error(values)
            printed = result.cell.paper
            rows.append(
                {
                    "panel": result.cell.panel,
                    "column": result.cell.column,
                    "row": result.cell.row,
                    "measure": measure.title,
                    "status": "fail" if result.failed else "done" if values else "not run",
                    "epochs": result.epochs,
                    "paper_epochs": result.cell.epochs[0] if result.cell.epochs else None,
                    "n": len(values),
                    "mean": mean,
                    "standard_error": error,
                    "paper": paper(result.cell),
                    "paper_fails": printed is not None and printed.value is None,
                    "paper_standard_error": printed.error if printed else None,
                    "difference": result.difference(measure),
                    "exceeds_both_errors": result.marked(measure),
                    "setting": " ".join(result.setting),
                    "records": " ".join(record.name for record in result.records),
                    "code": "; ".join(dict.fromkeys(record.code for record in result.records)),
                }
            )
    return pd.DataFrame(rows)


def _compared_by(pairs: list[Pair]) -> str:
    return (
        f"By {method(pairs)}. Of such intervals 95 % hold the true difference, each by itself; Holm's correction is "
        "over this table. The detectable difference is the true one that as many seeds, on as many test samples, find "
        "with 80 % probability, without a correction."
    )


def _measured(experiment: Experiment, found: list[CellResult], selection: str) -> str:
    measures = experiment.measures
    shown = f"{measures[0].title}: mean" if len(measures) == 1 else "Mean"
    shown = f"{shown[0].upper()}{shown[1:]} {SPREAD} at the last epoch{_budget(found)}"
    chosen = tuning_tables.protocol(selection) if any(cell.sweep for cell in experiment.cells) else ""
    return f"{shown}. {chosen}".rstrip()


def _budget(found: list[CellResult]) -> str:
    """The epochs, where no column says them, and the panels that have no columns, if others have."""
    told = [o for o in found if o.records and not o.cell.column and o.epochs is not None]
    epochs = sorted({o.epochs for o in told if o.epochs is not None})
    panels = dict.fromkeys(o.cell.panel for o in told) if any(o.cell.column for o in found) else {}
    where = f" on {' and '.join(panels)}" if panels else ""
    return f" of {' or '.join(map(str, epochs))}{where}" if epochs else ""


def _marks(found: list[CellResult]) -> str:
    printed = [result.cell.paper for result in found if result.cell.paper is not None]
    if not printed:
        return ""
    if not any(paper.error for paper in printed):
        return (
            "The line below gives the paper's number and the difference. The paper gives no standard errors here, so "
            "no difference is marked."
        )
    return (
        "The line below gives the paper's number and the difference, with * where it exceeds each of the two standard "
        "errors, which is no test."
    )


def _warnings(found: list[CellResult]) -> dict[str, list[str]]:
    """The cells of each warning of their runs, those that chose hyperparameters included."""
    warned: dict[str, list[str]] = {}
    runs = [[*result.records, *(record for _, record in result.tried)] for result in found]
    other = other_data({record.name: record for records in runs for record in records}.values())
    for result, records in zip(found, runs, strict=True):
        each = (w for record in records for w in (*record.warnings, *other.get(record.name, ())))
        for warning in dict.fromkeys(each):
            warned.setdefault(warning, []).append(result.cell.name)
    return warned


def provenance(shown: Iterable[Record], chosen_by: Iterable[Record] = ()) -> str:
    """Code versions and hardware, in a line. A run that several cells show is counted once."""
    records, tuning = ({record.name: record for record in given}.values() for given in (shown, chosen_by))
    if not records:
        return "No runs yet."
    machines = sorted({machine for record in records for machine in record.machines})
    packages = sorted({p for record in records for p in record.packages if p.startswith("torch ")})
    chosen = f", after {len(tuning)} that chose the hyperparameters, {_code(tuning)}" if tuning else ""
    runs = f"{len(records)} run{'s' if len(records) > 1 else ''}"
    return f"{runs}, {_code(records)}{chosen}; {', '.join(packages)}; {', '.join(machines)}."


def entry(result: CellResult, measure: Measure) -> Entry:
    printed = result.cell.paper
    text = number_format(measure.digits)
    difference = result.difference(measure)
    return Entry(
        ours="Fail" if result.failed else format_mean(result.values(measure), measure.digits),
        paper="" if printed is None else "Fail" if printed.value is None else f"{printed.value:{text}}",
        difference="" if isnan(difference) else f"{difference:+{text}}",
        marked=result.marked(measure),
        records=result.records,
    )


COMPARED = ("", "", "gain with LAWN", "95 % interval", "p", "p, Holm", "detectable", "seeds", "the paper's gain")


def _compared(pair: Pair) -> list[str]:
    known = not isnan(pair.gain.p)
    return [
        pair.place,
        f"{pair.base} → {pair.rival}",
        format_signed(pair.gain.difference),
        format_interval(pair.gain) if known else "",
        f"{pair.gain.p:.2g}" if known else "",
        f"{pair.adjusted:.2g}" if known else "",
        f"{pair.gain.detectable():.2g}" if known else "",
        f"{pair.seeds[0]}, {pair.seeds[1]}",
        format_signed(pair.paper),
    ]


def _epochs(cells: list[CellResult], column: str) -> str:
    """What is said of a column's budget, where the cells have one and its title does not say it."""
    if column.endswith(" epochs"):
        return ""
    here = [o for o in cells if o.cell.column == column and o.cell.epochs]
    run = sorted({o.epochs for o in here if o.records and o.epochs is not None})
    paper = max((o.cell.epochs[0] for o in here), default=0)
    if run in ([], [paper]):
        return f"; {paper} epochs" if paper else ""
    return f"; {' and '.join(map(str, run))} of {paper} epochs"


def _code(records: Iterable[Record]) -> str:
    """The versions of the code, the most frequent first, and how many of the runs are of each."""
    versions = Counter(record.code for record in records).most_common()
    if len(versions) == 1:
        return f"code {versions[0][0]}"
    return "code " + ", ".join(f"{version} ({count})" for version, count in versions)
