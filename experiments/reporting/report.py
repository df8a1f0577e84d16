"""Pages, tables and figures as files, from records alone."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from experiments.definitions.spec import Experiment
from experiments.records import Store
from experiments.reporting.curves import costs, curves_page
from experiments.reporting.drawing import save
from experiments.reporting.layout import Entry, Panel
from experiments.reporting.literature import CAPTION, literature_table
from experiments.reporting.page import Page, experiment_page
from experiments.reporting.web.findings import Finding, findings
from experiments.reporting.web.index import index_html
from lawn.files import write_text

RESULTS = Path(__file__).resolve().parents[2] / "results"
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def page_of(experiment: Experiment, store: Store, selection: str = "val") -> Page:
    """The page of an experiment."""
    build = curves_page if experiment.figure == "tuning" else experiment_page
    page = build(experiment, store, selection)
    if experiment.beside_literature:
        page = replace(page, literature=literature_table(store, page.cell_results, selection), of_literature=CAPTION)
    return page


def latex(page: Page) -> str:
    """A tabular for each panel, with rules of booktabs: our numbers, the paper's, if any, in square brackets."""
    parts = []
    for panel in page.panels:
        table = _grid(panel, _with_paper)
        style = table.style.format(escape="latex").format_index(escape="latex").format_index(axis=1, escape="latex")
        parts.append(f"% {panel.title or page.title}\n{style.to_latex(hrules=True)}")
    brackets = " In brackets: the paper." if page.marks else ""
    return f"% {page.title}. {page.measured}{brackets}\n" + "\n".join(parts)


def terminal(page: Page) -> str:
    """The table for a terminal."""
    parts = [page.title, page.measured]
    for panel in page.panels:
        table = _grid(panel, lambda e: e.ours + (f" [paper {e.paper}]" if e.paper else ""))
        parts.append("\n".join(filter(None, (panel.title, table.to_string()))))
    return "\n\n".join(parts)


def _grid(panel: Panel, text: Callable[[Entry], str]) -> pd.DataFrame:
    """A panel as it is printed, each entry as `text` writes it."""
    rows = [[text(entry) for entry in entries] for _, entries in panel.rows]
    return pd.DataFrame(rows, columns=panel.columns, index=[row for row, _ in panel.rows])


def _with_paper(entry: Entry) -> str:
    """Our number, and the paper's in square brackets."""
    return " ".join(filter(None, (entry.ours, f"[{entry.paper}]" if entry.paper else "")))


def write(page: Page, results: Path = RESULTS) -> None:
    """Write results/NAME.md, .csv and .tex, the list of the tuning runs, and the figure."""
    write_text(results / f"{page.name}.md", render("experiment.md", page=page) + "\n")
    write_text(results / f"{page.name}.csv", page.frame.to_csv(index=False, float_format="%.6g"))
    write_text(results / f"{page.name}.tex", latex(page))
    if not page.tuning.empty:
        write_text(results / "tuning" / f"{page.name}.csv", page.tuning.to_csv(index=False, float_format="%.6g"))
    if page.figure is not None:
        save(page.figure, results / f"{page.name}.svg")


def write_index(pages: Sequence[Page], results: Path) -> None:
    """Write results/index.html, one file with everything in it; `pages` have been written before."""
    write_text(results / "index.html", index(pages, results))


def index(pages: Sequence[Page], results: Path, version: str = "") -> str:
    """The page of all results; figures that are no charts are those that have been written. See `index_html`."""
    drawn = {page.name: results / f"{page.name}.svg" for page in pages if page.chart is None and page.figure_shown}
    images = {name: path.read_text("utf8") for name, path in drawn.items() if path.exists()}
    return index_html(pages, images, version)


def render(template: str, **content: object) -> str:
    return TEMPLATES.get_template(template).render(**content)


def update_blocks(pages: Sequence[Page]) -> None:
    """Renew the blocks of README.md, results/README.md and docs/, from all pages."""
    said = findings(pages)
    for path in pages_with_blocks():
        write_text(path, with_updated_blocks(path, pages, said))


def pages_with_blocks() -> list[Path]:
    """The pages that may have blocks."""
    root = RESULTS.parent
    return [root / "README.md", RESULTS / "README.md", *sorted((root / "docs").rglob("*.md"))]


def with_updated_blocks(path: Path, pages: Iterable[Page], said: Sequence[Finding] = ()) -> str:
    """The text of a page with its blocks renewed: what stands between `<!-- summary NAME -->`, `<!-- summary-table NAME
    -->` (the columns with numbers of ours), `<!-- costs NAME -->` (how much E_free matters), `<!-- output NAME -->` (as
    the terminal shows it) or `<!-- findings -->` and `<!-- end -->`."""
    by_name = {page.name: page for page in pages}

    def renewed(found: re.Match[str]) -> str:
        head, kind, name, content = found.groups()
        if kind == "findings" and said:
            content = render("findings.md", findings=said)
        elif name in by_name:
            content = f"{BLOCKS[kind](by_name[name])}\n"
        return head + content

    kinds = "|".join((*BLOCKS, "findings"))
    return re.sub(rf"(<!-- ({kinds}) ?(\w*) -->\n)(.*?)(?=<!-- end -->)", renewed, path.read_text("utf8"), flags=re.S)


def summary_table(page: Page) -> str:
    """The rows and columns that have numbers of ours as Markdown tables, one for each panel: the paper's numbers in
    square brackets."""
    return "\n\n".join(filter(None, map(_summary_panel, page.panels)))


def _summary_panel(panel: Panel) -> str:
    ours = [[bool(entry.ours) for entry in row] for _, row in panel.rows]
    table = _grid(panel, _with_paper).loc[list(map(any, ours)), list(map(any, zip(*ours, strict=True)))]
    rows = [[str(name), *cells] for name, cells in zip(table.index, table.to_numpy().tolist(), strict=True)]
    head = [panel.title, *table.columns]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)) if rows else ""


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


BLOCKS: dict[str, Callable[[Page], str]] = {
    "summary-table": summary_table,
    "summary": lambda page: _list(page.summary),
    "costs": lambda page: "" if page.experiment is None else _list(costs(page.experiment, list(page.cell_results))),
    "output": lambda page: f"```text\n{terminal(page)}\n```",
}
