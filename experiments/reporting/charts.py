"""Charts as data, which the figures in files and the results page draw alike."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle

import numpy as np

from experiments.definitions.spec import Cell, Experiment
from experiments.reporting.cell_results import CellResult, at_place, comparisons, paper, places
from experiments.reporting.statistics import mean_and_error
from experiments.reporting.trials import best_by_place, best_of_curves


@dataclass(frozen=True)
class Line:
    label: str
    color: int  # index of the palette
    x: Sequence[float]
    y: Sequence[float]  # NaN where there is no value
    low: Sequence[float] = ()  # of the band around it, or of bars where it has points
    high: Sequence[float] = ()
    style: str = "solid"  # or dashed, dotted
    points: bool = False  # a point at each value
    mark: int | None = None  # the index of the last point before LAWN fixes the norms


@dataclass(frozen=True)
class Subplot:
    title: str
    xlabel: str
    ylabel: str
    lines: Sequence[Line]
    xscale: str = "linear"  # or log
    yscale: str = "linear"
    ticks: Mapping[float, str] = field(default_factory=dict)  # of x; empty: as the library chooses
    ymin: float | None = None
    rule: float | None = None  # a horizontal line


@dataclass(frozen=True)
class Chart:
    rows: Sequence[Sequence[Subplot]]
    size: tuple[float, float] = (3.6, 3.1)  # of a subplot, inches
    legends: str = "chart"  # one for all, or one for each "row"


def over_epochs(experiment: Experiment, found: list[CellResult]) -> Chart:
    """A curve for each cell and measure, mean over seeds with their range as the band. A cell with a diverged run is
    left out, as "Fail" in the table says.
    """
    shown = [o for o in found if o.records and not o.failed]
    styles = dict(zip((o.cell.row for o in found), cycle(("solid", "dashed"))))
    return Chart(
        [
            [
                Subplot(
                    "",
                    "epoch",
                    measure.title,
                    [curve(o, measure.key, i, styles[o.cell.row]) for i, o in enumerate(shown)],
                    yscale=(measure.curve if shown else None) or "linear",
                )
                for measure in experiment.measures
                if measure.curve
            ]
        ]
    )


def curve(result: CellResult, key: str, color: int = 0, style: str = "solid") -> Line:
    """A column of metrics.csv over the epochs that all seeds have: the mean over seeds, and their range. The last point
    at which the norms of no seed are fixed is marked; records may lack the epochs between it and the next.
    """
    records = result.records
    epochs = sorted(set.intersection(*({*record.column("epoch")} for record in records)))
    kept = [np.isin(record.column("epoch"), epochs) for record in records]
    values = np.stack([np.array(r.column(key), float)[rows] for r, rows in zip(records, kept, strict=True)])
    fixed = np.any([np.array(r.column("constrained"))[rows] for r, rows in zip(records, kept, strict=True)], axis=0)
    mark = int(fixed.argmax()) - 1 if fixed.any() and not fixed[0] else None
    return Line(
        result.cell.row,
        color,
        epochs,
        values.mean(0).tolist(),
        values.min(0).tolist(),
        values.max(0).tolist(),
        style=style,
        mark=mark,
    )


def over_batch_size(experiment: Experiment, found: list[CellResult]) -> Chart:
    """The first measure over the batch size, a subplot for each dataset, and below it the gain with LAWN and its 95 %
    interval; the paper's numbers dotted.
    """
    return _over(experiment, found, "batch size", lambda cell: int(cell.value("train.batch_size")))


def over_horizon(experiment: Experiment, found: list[CellResult]) -> Chart:
    """The first measure over the epochs of a run, and the gain with LAWN, as `over_batch_size`."""
    return _over(experiment, found, "epochs", lambda cell: cell.epochs[0])


def _over(experiment: Experiment, found: list[CellResult], xlabel: str, x: Callable[[Cell], int]) -> Chart:
    measure = experiment.measures[0]
    rows = list(dict.fromkeys(o.cell.row for o in found if o.values(measure) or not np.isnan(paper(o.cell))))
    colors = {pair: len(rows) + i for i, pair in enumerate(p for p in experiment.pairs if {*p} <= {*rows})}
    subplots: list[Subplot] = []
    for panel in dict.fromkeys(result.cell.panel for result in found):
        here = [o for o in found if o.cell.panel == panel]
        lines = []
        for i, row in enumerate(rows):
            line = [o for o in here if o.cell.row == row]
            at = [float(x(o.cell)) for o in line]
            ours = [mean_and_error(o.values(measure)) for o in line]
            means, bars = [mean for mean, _ in ours], [0.0 if np.isnan(error) else error for _, error in ours]
            low, high = ([m + sign * bar for m, bar in zip(means, bars, strict=True)] for sign in (-1, 1))
            if not all(map(np.isnan, means)):
                lines.append(Line(f"{row}, ours", i, at, means, low, high, points=True))
            theirs = [paper(o.cell) for o in line]
            if not all(map(np.isnan, theirs)):
                lines.append(Line(f"{row}, paper", i, at, theirs, style="dotted", points=True))
        ticks = {float(x(o.cell)): o.cell.column.removeprefix("batch ").removesuffix(" epochs") for o in here}
        ylabel = measure.title if not subplots else ""
        subplots.append(Subplot(panel, xlabel, ylabel, lines, xscale="log", ticks=dict(sorted(ticks.items()))))
    gains = [
        replace(
            subplot,
            ylabel="gain with LAWN" if i == 0 else "",
            lines=_gains(experiment, [o for o in found if o.cell.panel == subplot.title], x, colors),
            rule=0.0,
        )
        for i, subplot in enumerate(subplots)
    ]
    return Chart([subplots, gains], (2.6, 2.6))


def _gains(
    experiment: Experiment, here: list[CellResult], x: Callable[[Cell], int], colors: dict[tuple[str, str], int]
) -> list[Line]:
    """The gains of each pair of rows in one panel, and the paper's, in the colors of the pairs."""
    sign = experiment.measures[0].sign
    compared = comparisons(experiment, here)
    at = {(o.cell.row, o.cell.column): o.cell for o in here}
    lines = []
    for (base, rival), color in colors.items():
        name = f"{rival} over {base}"
        pairs = [pair for pair in compared if (pair.base, pair.rival) == (base, rival)]
        if pairs:
            where = [float(x(at[rival, pair.column])) for pair in pairs]
            gain = [pair.gain.difference for pair in pairs]
            low, high = ([pair.gain.interval()[end] for pair in pairs] for end in (0, 1))
            lines.append(Line(f"{name}, ours", color, where, gain, low, high, points=True))
        both = [(cell, at[base, column]) for (row, column), cell in at.items() if row == rival and (base, column) in at]
        printed = [sign * (paper(cell) - paper(other)) for cell, other in both]
        if not all(map(np.isnan, printed)):
            where = [float(x(cell)) for cell, _ in both]
            lines.append(Line(f"{name}, paper", color, where, printed, style="dotted", points=True))
    return lines


def over_trials(experiment: Experiment, found: list[CellResult]) -> Chart:
    """The expected best of k settings and the interval around it: a row of subplots for each LAWN variant and the rows
    that it is compared with, one for each batch size and schedule.
    """
    families = {rival: [base for base, other in experiment.pairs if other == rival] for _, rival in experiment.pairs}
    best_at = best_by_place(best_of_curves(found))
    rows = []
    for rival, bases in families.items():
        subplots: list[Subplot] = []
        for panel, column in places(found):
            lines = []
            for row, color in zip((*bases, rival), (*(0, 2)[: len(bases)], 1), strict=True):
                best = best_at.get((panel, column, row))
                if best is not None:
                    k = np.arange(1, len(best.mean) + 1).tolist()
                    lines.append(Line(row, color, k, best.mean.tolist(), best.low.tolist(), best.high.tolist()))
            epochs = at_place(found, panel, column)[0].epochs
            low = min((min(line.y) for line in lines), default=0.0)
            subplots.append(
                Subplot(
                    f"{column}, {epochs} epochs",
                    "settings tried",
                    experiment.measures[0].title if not subplots else "",
                    lines,
                    xscale="log",
                    ticks={float(k): str(k) for k in (1, 5, 10, 48)},
                    ymin=max(0.0, low - 2),
                )
            )
        rows.append(subplots)
    return Chart(rows, (2.1, 2.1), legends="row")


CHARTS = {"tuning": over_trials, "epochs": over_epochs, "batch": over_batch_size, "horizon": over_horizon}
