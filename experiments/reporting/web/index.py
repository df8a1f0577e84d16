"""The text of results/index.html: tables as HTML, everything else as data that the page draws when it is looked at."""

import gzip
import json
import re
import shlex
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan, nan
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from experiments.reporting.charts import Chart
from experiments.reporting.layout import Entry, Panel, format_signed, number_format
from experiments.reporting.outcomes import Outcome, Pair, paper
from experiments.reporting.page import SPREAD, Page
from experiments.reporting.statistics import mean_and_error, mean_interval
from experiments.reporting.web.cells import cell_key, chart_data, detail
from experiments.reporting.web.findings import coverage, findings

ASSETS = Path(__file__).parent / "assets"
LIBRARIES = ("d3", "plot.umd")  # below assets/vendor, in the order in which they are loaded
TEMPLATES = Environment(
    loader=FileSystemLoader(ASSETS),
    autoescape=lambda name: name is not None and name.endswith(".html"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
LONG = 20  # rows; tables with more are folded
INTERVAL = "(95 % interval over seeds by Student's t, n seeds)"  # what follows a mean in the cells
TUNED = "tuning runs"  # of a cell without final runs
BASES = {"adam": "Adam", "sgd": "SGD", "lamb": "LAMB"}  # optimizers, by the beginning of the names of their variants


def linked(text: str) -> Markup:
    """Text with links of Markdown, as HTML."""
    return Markup(re.sub(r"\[(.*?)\]\((.*?)\)", r'<a href="\2">\1</a>', str(escape(re.sub("</?sup>", "", text)))))


TEMPLATES.filters["linked"] = linked
TEMPLATES.globals |= {"TUNED": TUNED, "LONG": LONG}


@dataclass(frozen=True)
class Numbers:
    """What is sorted, and copied as CSV; NaN where there is none."""

    value: float = nan
    low: float = nan
    high: float = nan
    n: int = 0
    paper: float = nan
    difference: float = nan
    gain: float = nan
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
    key: str = ""  # of what it opens; empty: nothing
    numbers: Numbers = field(default_factory=Numbers)


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
    filled: bool  # with at least one number of ours
    state: str  # what is said where it is not
    fill: str  # the command that runs what is missing; empty for a simulation
    with_paper: bool
    with_gains: bool

    @property
    def groups(self) -> list[str]:
        return list(dict.fromkeys(row.base for row in self.rows if row.base))


@dataclass(frozen=True)
class PageView:
    page: Page
    panels: list[PanelView]
    measured: str
    image: str = ""  # an SVG, packed


def index_html(pages: Sequence[Page], images: Mapping[str, str], version: str = "") -> str:
    """The page. `images`: SVG of the figures that are no charts, by the names of their pages; `version`: of the
    records, for a page that asks its server for the state of the runs.
    """
    details: dict[str, str] = {}
    views = [_page_view(page, images.get(page.name, ""), details) for page in pages]
    return (
        TEMPLATES.get_template("index.html").render(
            views=views,
            charts={
                page.name: _json(chart_data(page.chart)) for page in pages if page.chart and _has_lines(page.chart)
            },
            details=details,
            libraries={name: packed((ASSETS / "vendor" / f"{name}.min.js").read_text("utf8")) for name in LIBRARIES},
            coverage=coverage(pages),
            findings=findings(pages),
            version=version,
        )
        + "\n"
    )


def _has_lines(chart: Chart) -> bool:
    """False where all cells have failed."""
    return any(subplot.lines for row in chart.rows for subplot in row)


def packed(text: str) -> Markup:
    """As the page unpacks it; it may stand in an element `script`."""
    return Markup(b64encode(gzip.compress(text.encode(), mtime=0)).decode())


TEMPLATES.filters["pack"] = packed


def _json(content: Any) -> str:
    """JSON that may stand in an element `script`."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _page_view(page: Page, image: str, details: dict[str, str]) -> PageView:
    """Adds what the cells open to `details`, packed, by their keys."""
    panels = [_panel_view(page, panel, details) for panel in page.panels]
    measured = page.measured if page.experiment is None else page.measured.replace(SPREAD, INTERVAL)
    return PageView(page, panels, measured, packed(image) if image else "")


def _panel_view(page: Page, panel: Panel, details: dict[str, str]) -> PanelView:
    rows = [RowView(row, _base(entries), [_cell(page, e, details) for e in entries]) for row, entries in panel.rows]
    cells = [cell for row in rows for cell in row.cells]
    filled = any(cell.main != TUNED for cell in cells if cell.main)
    state = "tuning runs only" if any(cell.key for cell in cells) else "not run yet"
    outcomes = [entry.outcome for _, entries in panel.rows for entry in entries if entry.outcome is not None]
    return PanelView(
        panel.title,
        panel.columns,
        rows,
        filled,
        state,
        _fill(page, outcomes),
        with_paper=any(not isnan(cell.numbers.paper) for cell in cells),
        with_gains=any(cell.gains for cell in cells),
    )


def _fill(page: Page, outcomes: Sequence[Outcome]) -> str:
    """The command that runs what is missing of these cells: with --only where they are not all of the experiment, and
    with --short where all numbers are of the short budget.
    """
    begun = [outcome for outcome in outcomes if outcome.records or outcome.tried]
    short = " --short" if begun and all(map(_is_short, begun)) else ""
    selection = " --selection test" if page.name.endswith("-selected-on-test") else ""
    return f"{_of_cells(page, outcomes)}{short}{selection}"


def _is_short(outcome: Outcome) -> bool:
    budgets = outcome.cell.epochs
    return len(budgets) > 1 and outcome.study is not None and outcome.study.budget == budgets[-1]


def _of_cells(page: Page, outcomes: Sequence[Outcome]) -> str:
    if page.experiment is None:
        return f"python -m experiments run {page.name}"
    cells = {outcome.cell for outcome in outcomes}
    shared = set.intersection(*(set(cell.overrides) for cell in cells)) if cells else set()
    others = [cell for cell in page.experiment.cells if cell not in cells]
    if not others or any(shared <= set(other.overrides) for other in others):
        return f"python -m experiments run {page.experiment.name}"
    ordered = [override for override in next(iter(outcomes)).cell.overrides if override in shared]
    kept = list(ordered)
    for override in ordered:  # the fewest that name no other cell
        fewer = {other for other in kept if other != override}
        if fewer and not any(fewer <= set(other.overrides) for other in others):
            kept.remove(override)
    return f"python -m experiments run {page.experiment.name} --only {shlex.join(kept)}"


def _base(entries: Sequence[Entry]) -> str:
    """The optimizer that a row is a variant of."""
    for entry in entries:
        if entry.outcome is not None:
            names = [o.partition("=")[2] for o in entry.outcome.cell.overrides if o.startswith("optim=")]
            return next((base for name in names for key, base in BASES.items() if name.startswith(key)), "")
    return ""


def _cell(page: Page, entry: Entry, details: dict[str, str]) -> CellView:
    outcome, measure, experiment = entry.outcome, entry.measure, page.experiment
    if outcome is None or measure is None or experiment is None:
        return CellView(entry.ours, numbers=Numbers(_leading_number(entry.ours)))
    key = ""
    if measure is experiment.measures[0] and (outcome.records or outcome.tried):
        key = cell_key(outcome, experiment.measures)
        if key not in details:
            details[key] = packed(_json(detail(outcome, experiment.measures, _fill(page, [outcome]))))
    printed = f"paper {entry.paper}" if entry.paper else ""
    if not outcome.records:
        main = entry.ours or (TUNED if key else "")
        return CellView(
            main,
            paper=printed,
            key=key,
            numbers=Numbers(_leading_number(entry.ours), n=0, paper=paper(outcome.cell)),
        )
    values, text = outcome.values(measure), number_format(measure.digits)
    mean, low, high = mean_and_error(values)[0], *mean_interval(values)
    first = measure is experiment.measures[0]
    pairs = [pair for pair in page.pairs if first and _is_rival(pair, outcome)]
    return CellView(
        main="Fail" if outcome.failed else f"{mean:{text}}",
        soft=_soft(outcome, f"{low:{text}} to {high:{text}}" if len(values) > 1 else "", len(values)),
        paper=printed,
        difference=f"{entry.difference}{'*' if entry.marked else ''}",
        gains=[_gain(pair) for pair in pairs],
        key=key,
        numbers=Numbers(
            mean,
            low,
            high,
            len(values),
            paper(outcome.cell),
            outcome.difference(measure),
            *(pairs[0].gain.difference, *pairs[0].gain.interval()) if pairs else (nan, nan, nan),
        ),
    )


def _soft(outcome: Outcome, interval: str, n: int) -> str:
    """Interval, number of seeds, and the budget where it is not the paper's."""
    budget = outcome.cell.epochs[0] if outcome.cell.epochs else outcome.epochs
    shorter = "" if outcome.epochs == budget else f"after {outcome.epochs} epochs"
    return ", ".join(filter(None, (interval, f"n={n}" if n else "", shorter)))


def _is_rival(pair: Pair, outcome: Outcome) -> bool:
    cell = outcome.cell
    return (pair.panel, pair.column, pair.rival) == (cell.panel, cell.column, cell.row)


def _gain(pair: Pair) -> tuple[str, str]:
    low, high = pair.gain.interval()
    interval = "" if isnan(pair.gain.p) else f"{format_signed(low)} to {format_signed(high)} "
    printed = "" if isnan(pair.paper) else f", paper {format_signed(pair.paper)}"
    return format_signed(pair.gain.difference), f"{interval}over {pair.base}{printed}"


def _leading_number(text: str) -> float:
    """The number that a text begins with."""
    try:
        return float(text.split()[0].rstrip(","))
    except (IndexError, ValueError):
        return nan
