"""Figures from outcomes."""

from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from experiments.definitions.spec import Cell, Experiment
from experiments.reporting.outcomes import Outcome, paper, places
from experiments.reporting.statistics import mean_and_error
from experiments.reporting.trials import best_of_curves
from lawn.diagnostics import figure as diagnostics
from lawn.files import atomic
from lawn.plotting import Figure, rc_context

STYLE: dict[Any, Any] = {**diagnostics.STYLE, "svg.hashsalt": "lawn"}


def save(make: Callable[[], Figure], path: Path) -> None:
    """Draw a figure in the common style and write it as .png and .svg."""
    with rc_context(STYLE):
        figure = make()
        for suffix in (".png", ".svg"):
            with atomic(path.with_suffix(suffix)) as temporary:
                figure.savefig(temporary, dpi=150, metadata={"Date": None} if suffix == ".svg" else None)


def over_epochs(experiment: Experiment, found: list[Outcome]) -> Figure:
    """A curve for each cell and measure, mean over seeds with their range shaded; a dot marks where LAWN fixes the
    norms. A cell with a diverged run is left out, as "Fail" in the table says.
    """
    measures = [measure for measure in experiment.measures if measure.curve]
    figure = Figure(figsize=(3.6 * len(measures), 3.1), layout="constrained")
    axes = figure.subplots(1, len(measures), squeeze=False)[0]
    for outcome, style in zip(found, cycle(("-", "--"))):
        if not outcome.records or outcome.failed:
            continue
        histories = [record.history for record in outcome.records]
        epochs = histories[0]["epoch"].to_numpy()
        constrained = histories[0]["constrained"].to_numpy()
        for axis, measure in zip(axes, measures, strict=True):
            curves = np.stack([history[measure.key].to_numpy(float) for history in histories])
            mean = curves.mean(0)
            (line,) = axis.plot(epochs, mean, style, label=outcome.cell.row)
            axis.fill_between(epochs, curves.min(0), curves.max(0), alpha=0.2, color=line.get_color(), linewidth=0)
            if constrained.any():
                switch = max(0, int(constrained.argmax()) - 1)  # the last point of the free phase
                axis.plot(epochs[switch], mean[switch], "o", color=line.get_color(), markersize=5)
    for axis, measure in zip(axes, measures, strict=True):
        axis.set(xlabel="epoch", ylabel=measure.title, yscale=measure.curve if axis.lines else "linear")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, ncols=4, loc="outside upper center")
    return figure


def over_batch_size(experiment: Experiment, found: list[Outcome]) -> Figure:
    """The first measure over the batch size, a panel for each dataset; the paper's numbers dotted."""
    return _over(experiment, found, "batch size", lambda cell: int(cell.value("train.batch_size")))


def over_horizon(experiment: Experiment, found: list[Outcome]) -> Figure:
    """The first measure over the epochs of a run, a panel for each dataset; the paper's numbers dotted."""
    return _over(experiment, found, "epochs", lambda cell: cell.epochs[0])


def _over(experiment: Experiment, found: list[Outcome], xlabel: str, x: Callable[[Cell], int]) -> Figure:
    panels = list(dict.fromkeys(outcome.cell.panel for outcome in found))
    rows = list(dict.fromkeys(outcome.cell.row for outcome in found))
    figure = Figure(figsize=(max(8.0, 2.6 * len(panels)), 3.1), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    measure = experiment.measures[0]
    for axis, panel in zip(axes, panels, strict=True):
        labels: dict[int, str] = {}
        for i, row in enumerate(rows):
            line = [o for o in found if (o.cell.panel, o.cell.row) == (panel, row)]
            at = [x(o.cell) for o in line]
            names = [o.cell.column.removeprefix("batch ").removesuffix(" epochs") for o in line]
            labels |= dict(zip(at, names, strict=True))
            ours = [mean_and_error(o.values(measure)) for o in line]
            means, errors = [m for m, _ in ours], [0.0 if np.isnan(e) else e for _, e in ours]
            axis.errorbar(at, means, errors, fmt="o-", color=f"C{i}", capsize=2, markersize=4, label=f"{row}, ours")
            theirs = [paper(o.cell) for o in line]
            if not all(map(np.isnan, theirs)):
                axis.plot(at, theirs, "s:", color=f"C{i}", markersize=3, alpha=0.6, label=f"{row}, paper")
        axis.set(xscale="log", title=panel, xlabel=xlabel)
        axis.set_xticks(list(labels), list(labels.values()))
        axis.minorticks_off()
    axes[0].set_ylabel(measure.title)
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, ncols=4, loc="outside lower center")
    return figure


def of_diagnostics(_: Experiment, found: list[Outcome]) -> Figure:
    """The figure of `python -m lawn.diagnostics`, for the first run of every cell."""
    return diagnostics.draw({outcome.cell.row: outcome.records[0].history for outcome in found if outcome.records})


def over_trials(experiment: Experiment, found: list[Outcome]) -> Figure:
    """The expected best of k settings and the interval around it: a row of panels for each LAWN variant and the rows
    that it is compared with, a column for each batch size and schedule.
    """
    families = {rival: [base for base, other in experiment.pairs if other == rival] for _, rival in experiment.pairs}
    columns = places(found)
    best_at = {(o.cell.panel, o.cell.column, o.cell.row): best for o, best in best_of_curves(found)}
    size = (2.1 * len(columns), 2.0 * len(families) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(families), len(columns), squeeze=False)
    for axes, (rival, bases) in zip(grid, families.items(), strict=True):
        for axis, (panel, column) in zip(axes, columns, strict=True):
            for row, color in zip((*bases, rival), (*["C0", "C2"][: len(bases)], "C1"), strict=True):
                best = best_at.get((panel, column, row))
                if best is None:
                    continue
                k = np.arange(1, len(best.mean) + 1)
                axis.plot(k, best.mean, color=color, label=row)
                axis.fill_between(k, best.low, best.high, alpha=0.15, color=color, linewidth=0)
            if not axis.lines:
                axis.set_axis_off()
                continue
            low = min(float(np.min(line.get_ydata())) for line in axis.lines)
            axis.set(xscale="log", xlim=(1, None), ylim=(max(0.0, low - 2), None))
            axis.set_xticks([1, 5, 10, 48], ["1", "5", "10", "48"])
            axis.minorticks_off()
            epochs = next(o.epochs for o in found if (o.cell.panel, o.cell.column) == (panel, column))
            axis.set_title(f"{column}, {epochs} epochs", fontsize="small")
        axes[0].set_ylabel(f"{experiment.measures[0].title}")
        lines = {line.get_label(): line for axis in axes for line in axis.lines}
        shown = [row for row in (*bases, rival) if row in lines]
        axes[0].legend([lines[row] for row in shown], shown, frameon=False, fontsize="x-small", loc="lower right")
    for axis in grid[-1]:
        axis.set_xlabel("settings tried")
    return figure


FIGURES = {
    "tuning": over_trials,
    "epochs": over_epochs,
    "batch": over_batch_size,
    "horizon": over_horizon,
    "diagnostics": of_diagnostics,
}
