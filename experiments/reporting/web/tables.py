"""The tables of the page: what each cell shows in each of the views, and which command fills a table."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isnan, nan

from experiments.reporting.cell_results import CellResult, Pair, paper
from experiments.reporting.layout import Entry, Panel, format_interval, format_signed, number_format
from experiments.reporting.page import Page
from experiments.reporting.statistics import mean_and_error, mean_interval
from experiments.reporting.web.cells import cell_key, detail, tuned_on
from experiments.reporting.web.data import json_text, packed

BASES = {"adam": "Adam", "sgd": "SGD", "lamb": "LAMB"}  # optimizers, by the beginning of the names of their variants


@dataclass(frozen=True)
class Numbers:
    """What is sorted, and copied as CSV; NaN where there is none."""

    value: float = nan
    low: float = nan
    high: float = nan
    error: float = nan
    n: int = 0
    paper: float = nan
    difference: float = nan
    gain: float = nan  # over the first row that it is compared with
    gain_low: float = nan
    gain_high: float = nan


@dataclass(frozen=True)
class CellView:
    """A cell of a table in each of the views."""

    main: str = ""
    soft: str = ""
    paper: str = ""  # the line below
    difference: str = ""
    gains: Sequence[tuple[str, str]] = ()  # with their intervals
    gain_over: str = ""  # the row that `numbers.gain` is over
    epochs: int | None = None
    key: str = ""  # of what it opens; empty: nothing
    tuned: bool = False  # without final runs
    numbers: Numbers = field(default_factory=Numbers)

    @property
    def marked(self) -> bool:
        return self.difference.endswith("*")


@dataclass(frozen=True)
class RowView:
    name: str
    base: str  # the optimizer that it is a variant of; empty: unknown
    cells: list[CellView]


@dataclass(frozen=True)
class PanelView:
    title: str
    columns: list[str]
    rows: list[RowView]
    fill: str  # the command that runs what is missing
    split: str  # on which the runs that choose hyperparameters were evaluated

    @property
    def _cells(self) -> list[CellView]:
        return [cell for row in self.rows for cell in row.cells]

    @property
    def filled(self) -> bool:
        """Whether there is a number of ours."""
        return any(cell.main and not cell.tuned for cell in self._cells)

    @property
    def state(self) -> str:
        """What is said where nothing is filled."""
        return "tuning runs only" if any(cell.key for cell in self._cells) else "not run yet"

    @property
    def marked(self) -> bool:
        return any(cell.marked for cell in self._cells)

    @property
    def partly_tuned(self) -> bool:
        return any(cell.key and cell.tuned for cell in self._cells)

    @property
    def groups(self) -> list[str]:
        return list(dict.fromkeys(row.base for row in self.rows if row.base))


def panel_view(page: Page, panel: Panel, details: dict[str, str]) -> PanelView:
    """Adds what the cells open to `details`, packed, by their keys."""
    rows = [RowView(row, _base(entries), [_cell(page, e, details) for e in entries]) for row, entries in panel.rows]
    results = [entry.result for _, entries in panel.rows for entry in entries if entry.result is not None]
    return PanelView(panel.title, panel.columns, rows, fill_command(page, results), tuned_on(results))


def fill_command(page: Page, results: Sequence[CellResult]) -> str:
    """The command that runs what is missing of these cells: with --only where they are not all of the experiment, and
    with --short where all numbers are of the short budget.
    """
    begun = [result for result in results if result.records or result.tried]
    short = " --short" if begun and all(map(_is_short, begun)) else ""
    selection = " --selection test" if page.name.endswith("-selected-on-test") else ""
    return f"{_of_cells(page, results)}{short}{selection}"


def _is_short(result: CellResult) -> bool:
    budgets = result.cell.epochs
    return len(budgets) > 1 and result.study is not None and result.study.budget == budgets[-1]


def _of_cells(page: Page, results: Sequence[CellResult]) -> str:
    if page.experiment is None:
        return f"python -m experiments run {page.name}"
    cells = {result.cell for result in results}
    shared = set.intersection(*(set(cell.overrides) for cell in cells)) if cells else set()
    others = [cell for cell in page.experiment.cells if cell not in cells]
    if not others or any(shared <= set(other.overrides) for other in others):
        return f"python -m experiments run {page.experiment.name}"
    ordered = [override for override in next(iter(results)).cell.overrides if override in shared]
    kept = list(ordered)
    for override in ordered:  # the fewest that name no other cell
        fewer = {other for other in kept if other != override}
        if fewer and not any(fewer <= set(other.overrides) for other in others):
            kept.remove(override)
    return f"python -m experiments run {page.experiment.name} --only {shlex.join(kept)}"


def _base(entries: Sequence[Entry]) -> str:
    """The optimizer that a row is a variant of."""
    for entry in entries:
        if entry.result is not None:
            names = [o.partition("=")[2] for o in entry.result.cell.overrides if o.startswith("optim=")]
            return next((base for name in names for key, base in BASES.items() if name.startswith(key)), "")
    return ""


def _cell(page: Page, entry: Entry, details: dict[str, str]) -> CellView:
    result, measure, experiment = entry.result, entry.measure, page.experiment
    if result is None or measure is None or experiment is None:
        return CellView(entry.ours, numbers=Numbers(_leading_number(entry.ours)))
    first = measure is experiment.measures[0]
    pairs = [pair for pair in page.pairs if first and _is_rival(pair, result)]
    key = ""
    if first and (result.records or result.tried):
        key = cell_key(result, experiment, entry.paper)
        if key not in details:
            said = list(map(_gain_in_words, pairs))
            content = detail(result, experiment.measures, entry.paper, said, fill_command(page, [result]))
            details[key] = packed(json_text(content))
    printed = f"paper {entry.paper}" if entry.paper else ""
    if not result.records:
        return _without_records(entry, result, printed, key)
    values, text = result.values(measure), number_format(measure.digits)
    (mean, error), (low, high) = mean_and_error(values), mean_interval(values)
    gain = (pairs[0].gain.difference, *pairs[0].gain.interval()) if pairs else (nan, nan, nan)
    return CellView(
        main="Fail" if result.failed else f"{mean:{text}}",
        soft=_soft(result, f"{low:{text}} to {high:{text}}" if len(set(values)) > 1 else "", len(values)),
        paper=printed,
        difference=f"{entry.difference}{'*' if entry.marked else ''}",
        gains=[_gain(pair) for pair in pairs],
        gain_over=pairs[0].base if pairs else "",
        epochs=result.epochs,
        key=key,
        numbers=Numbers(mean, low, high, error, len(values), paper(result.cell), result.difference(measure), *gain),
    )


def _without_records(entry: Entry, result: CellResult, printed: str, key: str) -> CellView:
    """A number of the tuning curves, or else the best score of the tuning so far, or only the paper's number."""
    numbers = Numbers(_leading_number(entry.ours), paper=paper(result.cell))
    if entry.ours:
        main, _, spread = entry.ours.partition(" (")
        return CellView(main, f"80 %: {spread.rstrip(')')}", paper=printed, key=key, numbers=numbers)
    scores = [record.headline for _, record in result.tried if not record.diverged]
    best = f", best {max(scores):.2f}" if scores else ""
    return CellView(f"tuning{best}" if key else "", paper=printed, key=key, tuned=True, numbers=numbers)


def _soft(result: CellResult, interval: str, n: int) -> str:
    """Interval, number of seeds, and the budget where it is not the paper's."""
    budget = result.cell.epochs[0] if result.cell.epochs else result.epochs
    shorter = "" if result.epochs == budget else f"after {result.epochs} epochs"
    seeds = f"n={n}" if interval or n < 2 else f"n={n}, all alike"
    return ", ".join(filter(None, (interval, seeds if n else "", shorter)))


def _is_rival(pair: Pair, result: CellResult) -> bool:
    cell = result.cell
    return (pair.panel, pair.column, pair.rival) == (cell.panel, cell.column, cell.row)


def _gain(pair: Pair) -> tuple[str, str]:
    interval = "" if isnan(pair.gain.p) else f"{format_interval(pair.gain)} "
    printed = "" if isnan(pair.paper) else f", paper {format_signed(pair.paper)}"
    return format_signed(pair.gain.difference), f"{interval}over {pair.base}{printed}"


def _gain_in_words(pair: Pair) -> str:
    known = [] if isnan(pair.gain.p) else [f"95 % interval {format_interval(pair.gain)}"]
    known += [] if isnan(pair.paper) else [f"the paper {format_signed(pair.paper)}"]
    return f"Gain over {pair.base}: {format_signed(pair.gain.difference)}" + (f" ({'; '.join(known)})" if known else "")


def _leading_number(text: str) -> float:
    """The number that a text begins with."""
    try:
        return float(text.split()[0].rstrip(","))
    except (IndexError, ValueError):
        return nan
