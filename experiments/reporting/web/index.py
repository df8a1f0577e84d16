"""The text of results/index.html: tables as HTML, everything else as data that the page draws when it is looked at."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from experiments.reporting.charts import Chart
from experiments.reporting.page import SPREAD, Page
from experiments.reporting.web.data import chart_data, json_text, packed
from experiments.reporting.web.findings import coverage, findings
from experiments.reporting.web.tables import PanelView, panel_view

ASSETS = Path(__file__).parent / "assets"
LIBRARIES = ("d3", "plot.umd")  # below assets/vendor, in the order in which they are loaded
LONG = 20  # rows; tables with more are folded
INTERVAL = "(95 % interval over seeds by Student's t, n seeds)"  # what follows a mean in the cells


def _linked(text: str) -> Markup:
    """Text with links of Markdown, as HTML; those to other pages lead to their sections."""
    here = re.sub(r"\]\((\w+)\.md\)", r"](#\1)", text)
    plain = str(escape(re.sub("</?sup>|`", "", here)))
    titled = re.sub(r"\[(.*?)\]\((\S*?) &#34;(.*?)&#34;\)", r'<a href="\2" title="\3">\1</a>', plain)
    return Markup(re.sub(r"\[(.*?)\]\((.*?)\)", r'<a href="\2">\1</a>', titled))


TEMPLATES = Environment(
    loader=FileSystemLoader(ASSETS),
    autoescape=lambda name: name is not None and name.endswith(".html"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters |= {"linked": _linked, "pack": packed}


@dataclass(frozen=True)
class PageView:
    page: Page
    panels: list[PanelView]
    measured: str
    image: str  # an SVG, packed; empty without one

    @property
    def label(self) -> str:
        """In the navigation."""
        head, colon, _ = self.page.title.partition(":")
        return head if colon else self.page.name.replace("_", " ").capitalize()

    @property
    def empty(self) -> bool:
        return not self.page.figure_shown and not any(panel.filled for panel in self.panels)


def index_html(pages: Sequence[Page], images: Mapping[str, str], version: str = "") -> str:
    """The page. `images`: SVG of the figures that are no charts, by the names of their pages; `version`: of the
    records, for a page that asks its server for the state of the runs.
    """
    details: dict[str, str] = {}
    views = [_page_view(page, images.get(page.name, ""), details) for page in pages]
    charts = {page.name: page.chart for page in pages if page.chart is not None and _has_lines(page.chart)}
    return (
        TEMPLATES.get_template("index.html").render(
            views=views,
            labels={view.page.name: view.label for view in views},
            charts={name: Markup(json_text(chart_data(chart))) for name, chart in charts.items()},
            details=details,
            libraries={name: packed((ASSETS / "vendor" / f"{name}.min.js").read_text("utf8")) for name in LIBRARIES},
            coverage=coverage(pages),
            findings=findings(pages),
            version=version,
            LONG=LONG,
        )
        + "\n"
    )


def _page_view(page: Page, image: str, details: dict[str, str]) -> PageView:
    """Adds what the cells open to `details`, packed, by their keys."""
    panels = [panel_view(page, panel, details) for panel in page.panels]
    measured = page.measured if page.experiment is None else page.measured.replace(SPREAD, INTERVAL)
    return PageView(page, panels, measured, packed(image) if image else "")


def _has_lines(chart: Chart) -> bool:
    """False where all cells have failed."""
    return any(subplot.lines for row in chart.rows for subplot in row)
