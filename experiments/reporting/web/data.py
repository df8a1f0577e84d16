"""Content of the page as data: JSON, packed where it is only needed when something is opened."""

import gzip
import json
from base64 import b64encode
from math import isfinite
from typing import Any

from markupsafe import Markup

from experiments.reporting.charts import Chart, Line

MAX_POINTS = 100  # of a curve


def packed(text: str) -> Markup:
    """As the page unpacks it; it may stand in an element `script`."""
    return Markup(b64encode(gzip.compress(text.encode(), mtime=0)).decode())


def json_text(content: Any) -> str:
    """JSON that may stand in an element `script`."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def chart_data(chart: Chart) -> dict[str, Any]:
    """A chart as plain data; curves are thinned to MAX_POINTS, their last point and the marked one stay."""
    return {
        "legends": chart.legends,
        "rows": [
            [
                {
                    "title": subplot.title,
                    "xlabel": subplot.xlabel,
                    "ylabel": subplot.ylabel,
                    "xscale": subplot.xscale,
                    "yscale": subplot.yscale,
                    "ticks": [[x, text] for x, text in subplot.ticks.items()],
                    "ymin": subplot.ymin,
                    "rule": subplot.rule,
                    "lines": [_line(line) for line in subplot.lines],
                }
                for subplot in row
                if subplot.lines
            ]
            for row in chart.rows
        ],
    }


def _line(line: Line) -> dict[str, Any]:
    step = -(-len(line.x) // MAX_POINTS) or 1
    kept = sorted({*range(0, len(line.x), step), len(line.x) - 1, *([] if line.mark is None else [line.mark])})
    kept = [index for index in kept if index >= 0]
    columns = {name: [number(getattr(line, name)[i]) for i in kept] for name in ("x", "y")}
    if len(line.low):
        columns |= {name: [number(getattr(line, name)[i]) for i in kept] for name in ("low", "high")}
    mark = None if line.mark is None else kept.index(line.mark)
    return {
        **{"label": line.label, "color": line.color, "style": line.style, "points": line.points, "mark": mark},
        **columns,
    }


def number(value: float, digits: int = 6) -> float | None:
    """With so many significant digits; None where it is not finite, for which JSON has no number."""
    return float(f"{value:.{digits}g}") if isfinite(value) else None
