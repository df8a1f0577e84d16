"""Figures in files."""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, is_dataclass
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.reporting.charts import Chart, Line, Subplot
from lawn.diagnostics import figure as diagnostics
from lawn.files import write_text
from lawn.plotting import Axes, Figure, rc_context

STYLE: dict[Any, Any] = {**diagnostics.STYLE, "svg.hashsalt": "lawn"}
DASHES = {"solid": "-", "dashed": "--", "dotted": ":"}
MIN_WIDTH = 8.0  # inches
LEGEND_WIDTH = 2.7  # inches for an entry of a legend


@dataclass(frozen=True)
class Drawing:
    """A function that draws, and the data that it draws."""

    function: Callable[[Any], Figure]
    data: Any

    def __call__(self) -> Figure:
        return self.function(self.data)

    @property
    def fingerprint(self) -> str:
        """A hash of the data to nine digits, of the code that draws it, and of the version of matplotlib."""
        code = [sys.modules[name].__file__ or "" for name in (self.function.__module__, __name__)]
        content = [version("matplotlib"), str(STYLE), *(Path(file).read_text("utf8") for file in code), self.data]
        exact = json.dumps(content, default=_plain)
        rounded = json.loads(exact, parse_float=lambda digits: f"{float(digits):.9g}")  # machines differ in the last
        return hashlib.sha256(json.dumps(rounded).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """What JSON does not know, in terms of what it knows."""
    if isinstance(value, pd.DataFrame):
        return value.to_csv()
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if is_dataclass(value):
        return vars(value)
    return value.name if isinstance(value, Path) else list(value)


def save(drawing: Drawing, path: Path) -> None:
    """Draw a figure in the common style and write it to an SVG file, unless the file there is of the same.

    Coordinates are rounded to a tenth of a point: about half the bytes.
    """
    fingerprint = drawing.fingerprint
    with suppress(OSError, UnicodeDecodeError):
        if f">{fingerprint}<" in path.read_text("utf8"):
            return
    text = StringIO()
    with rc_context(STYLE):
        drawing().savefig(text, format="svg", metadata={"Date": None, "Description": fingerprint})
    coordinates = re.compile(r'\b(?:d|x|y)="[^"]*"')
    write_text(path, coordinates.sub(lambda m: _shortened(m[0]), text.getvalue()))


def _shortened(coordinates: str) -> str:
    """Round coordinates to tenths; leave out the L of a line after a line, since SVG takes further points for lines."""
    tenths = re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.1f}", coordinates)
    return re.sub(r"([ML])([^A-Za-z\"]+(?:L[^A-Za-z\"]+)+)", lambda run: run[1] + run[2].replace(" \nL ", " "), tenths)


def draw(chart: Chart) -> Figure:
    """A chart as a figure; subplots without lines are left out."""
    columns = max(map(len, chart.rows), default=0)
    width, height = chart.size
    size = max(MIN_WIDTH, width * columns), height * len(chart.rows) + 0.2
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(chart.rows), columns, squeeze=False)
    for axes, subplots in zip(grid, chart.rows, strict=True):
        for axis, subplot in zip(axes, subplots, strict=True):
            _draw_subplot(axis, subplot)
        if chart.legends == "row" and (shown := _legend(axes)):
            axes[0].legend(*shown, frameon=False, fontsize="x-small", loc="lower right")
    if chart.legends == "chart" and (shown := _legend(figure.axes)):
        figure.legend(*shown, frameon=False, ncols=int(size[0] / LEGEND_WIDTH), loc="outside lower center")
    return figure


def _draw_subplot(axis: Axes, subplot: Subplot) -> None:
    for line in subplot.lines:
        _draw_line(axis, line)
    if not subplot.lines:
        axis.set_axis_off()
        return
    axis.set(xlabel=subplot.xlabel, ylabel=subplot.ylabel, xscale=subplot.xscale, yscale=subplot.yscale)
    axis.set_title(subplot.title, fontsize="medium")
    if subplot.rule is not None:
        axis.axhline(subplot.rule, color="0.6", linewidth=0.8)
    if subplot.ymin is not None:
        axis.set_ylim(bottom=subplot.ymin)
    if subplot.ticks:
        axis.set_xticks(list(subplot.ticks), list(subplot.ticks.values()))
        axis.minorticks_off()


def _draw_line(axis: Axes, line: Line) -> None:
    color, dashes = f"C{line.color}", DASHES[line.style]
    bars = line.points and len(line.low) > 0
    if bars:
        y = np.asarray(line.y)
        errors = (y - line.low, line.high - y)
        axis.errorbar(line.x, y, errors, fmt=f"o{dashes}", color=color, capsize=2, markersize=4, label=line.label)
        return
    marker = "s" if line.points else ""
    axis.plot(line.x, line.y, dashes, marker=marker, markersize=3, color=color, label=line.label)
    if len(line.low):
        axis.fill_between(line.x, line.low, line.high, alpha=0.2, color=color, linewidth=0)
    if line.mark is not None:
        axis.plot(line.x[line.mark], line.y[line.mark], "o", color=color, markersize=5)


def _legend(axes: Sequence[Axes]) -> tuple[list[Any], list[str]] | None:
    """The labelled lines of the axes, each label once; None without any."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return (list(found.values()), list(found)) if found else None
