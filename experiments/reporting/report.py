"""Pages, tables and figures as files, from records alone."""

from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from experiments.definitions.spec import Experiment
from experiments.records import Store
from experiments.reporting.curves import CurvesPage
from experiments.reporting.drawing import draw, save
from experiments.reporting.layout import Entry, Panel
from experiments.reporting.page import Page
from experiments.simulation import SimulationPage
from lawn.files import write_text

RESULTS = Path(__file__).resolve().parents[2] / "results"
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=lambda name: name is not None and name.endswith(".html"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)

AnyPage = Page | SimulationPage


def of(experiment: Experiment, store: Store, selection: str = "val") -> Page:
    """The page of an experiment."""
    return (CurvesPage if experiment.figure == "tuning" else Page)(experiment, store, selection)


def latex(page: AnyPage) -> str:
    """A tabular for each panel, with rules of booktabs: our numbers, the paper's, if any, in square brackets."""
    parts = []
    for panel in page.panels:
        table = _grid(panel, _with_paper)
        style = table.style.format(escape="latex").format_index(escape="latex").format_index(axis=1, escape="latex")
        parts.append(f"% {panel.title or page.experiment.title}\n{style.to_latex(hrules=True)}")
    brackets = "" if isinstance(page, SimulationPage) else " In brackets: the paper."
    return f"% {page.experiment.title}. {page.measured}{brackets}\n" + "\n".join(parts)


def terminal(page: AnyPage) -> str:
    """The table for a terminal."""
    parts = [page.experiment.title, page.measured]
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


def write(page: AnyPage, results: Path = RESULTS) -> None:
    """Write results/NAME.md, .csv and .tex, the list of the tuning runs, and the figure."""
    write_text(results / f"{page.name}.md", render("experiment.md", page=page) + "\n")
    write_text(results / f"{page.name}.csv", page.frame.to_csv(index=False, float_format="%.6g"))
    write_text(results / f"{page.name}.tex", latex(page))
    if isinstance(page, Page) and not page.tuning.empty:
        write_text(results / "tuning" / f"{page.name}.csv", page.tuning.to_csv(index=False, float_format="%.6g"))
    if isinstance(page, Page) and page.figured:
        draw(page.experiment, page.found, results / page.name)
    if isinstance(page, SimulationPage) and page.figured:
        save(page.figure, results / page.name)


def write_index(pages: Sequence[AnyPage], results: Path = RESULTS) -> None:
    """Write results/index.html, one file with everything in it; `pages` have been written before."""
    images = {
        page.name: b64encode((results / f"{page.name}.svg").read_bytes()).decode() for page in pages if page.figured
    }
    write_text(results / "index.html", render("index.html", pages=pages, images=images) + "\n")


def render(template: str, **content: object) -> str:
    return TEMPLATES.get_template(template).render(**content)


def embed(pages: Sequence[AnyPage]) -> None:
    """Renew the blocks of README.md, results/README.md and docs/."""
    for path in embedding():
        write_text(path, embedded(path, pages))


def embedding() -> list[Path]:
    """The pages that may have blocks."""
    root = RESULTS.parent
    return [root / "README.md", RESULTS / "README.md", *sorted((root / "docs").rglob("*.md"))]


def embedded(path: Path, pages: Iterable[AnyPage]) -> str:
    """The text of a page with its blocks renewed: what stands between `<!-- summary NAME -->`, `<!-- summary-table NAME
    -->` (the first panel, without links) or `<!-- output NAME -->` (as the terminal shows it) and `<!-- end -->`."""
    blocks = {}
    for page in pages:
        blocks[f"summary {page.name}"] = "\n".join(f"- {line}" for line in page.summary)
        blocks[f"summary-table {page.name}"] = summary_table(page)
        blocks[f"output {page.name}"] = f"```text\n{terminal(page)}\n```"
    text = path.read_text("utf8")
    for name, content in blocks.items():
        begin = f"<!-- {name} -->\n"
        head, found, rest = text.partition(begin)
        if found:
            text = f"{head}{begin}{content}\n{rest[rest.index('<!-- end -->') :]}"
    return text


def summary_table(page: AnyPage) -> str:
    """The first panel as a Markdown table: our numbers, the paper's in square brackets, no rows without either."""
    if not page.panels:
        return ""
    panel = page.panels[0]
    table = _grid(panel, _with_paper)
    rows = [
        [str(name), *cells] for name, cells in zip(table.index, table.to_numpy().tolist(), strict=True) if any(cells)
    ]
    head = [panel.title, *panel.columns]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
