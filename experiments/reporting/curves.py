"""The page of the tuning curves: how good the best of k random settings is, for every optimizer and batch size."""

from dataclasses import dataclass, replace

import pandas as pd

from experiments.definitions.spec import Experiment, Measure
from experiments.definitions.tuning_curves import FULL, SHORT
from experiments.planning import search
from experiments.records import Store
from experiments.reporting import tuning_tables
from experiments.reporting.cell_results import CellResult, cell_results, place, places
from experiments.reporting.layout import SPLITS, Entry, Table
from experiments.reporting.page import Page, chart_of, figure_of, page_name, page_title, panels, provenance
from experiments.reporting.statistics import BestOf
from experiments.reporting.trials import Best, best_by_place, best_of_curves, score

K = 5  # trials that a user may afford


def curves_page(experiment: Experiment, store: Store, selection: str = "val") -> Page:
    """The page of the tuning curves, from the grids instead of the final runs."""
    split = SPLITS[selection]
    measures = tuple(replace(m, title=m.title.replace("validation", split)) for m in experiment.measures)
    experiment = replace(experiment, measures=measures)
    found = cell_results(experiment, store, selection)
    complete = best_of_curves(found)
    best = best_by_place(complete)

    def entry_of(result: CellResult, measure: Measure, cells: list[CellResult]) -> Entry:
        curve = best.get((result.cell.panel, result.cell.column, result.cell.row))
        return Entry("" if curve is None else _written(curve))

    return Page(
        name=page_name(experiment, selection),
        title=page_title(experiment, selection),
        notes=experiment.notes,
        panels=panels(experiment, found, entry_of),
        measured=(
            f"The best {split} HR@10, %, that {K} random settings of a grid are expected to find, and in brackets "
            "the interval that holds it with 80 % probability, over the draw of settings: in closed form, from one run "
            "with seed 0 of every setting of the grid. A setting that diverged counts as 0. Where a few settings are "
            "far below all others, the mean may lie below the interval."
        ),
        provenance=provenance([record for result in found for _, record in result.tried]),
        summary=[
            *_easier(experiment, found, best),
            *costs(experiment, found),
            *_winners(found, best),
            *_filters(complete),
        ],
        frame=_frame(complete),
        chart=(chart := chart_of(experiment, found)),
        figure=figure_of(experiment, chart, found),
        figure_shown=bool(complete),
        source="tuning",
        source_title="The records of the runs",
        tuned=tuning_tables.table(found),
        grids=tuning_tables.grids(found),
        by_value=_values_table(complete, split),
        experiment=experiment,
        cell_results=found,
    )


@dataclass(frozen=True)
class ByValue:
    """The best score at each value of a hyperparameter, all others at their best."""

    hyperparameter: str
    best: dict[str, float]

    @property
    def winner(self) -> float:
        return float(max(self.best, key=lambda value: self.best[value]))

    @property
    def cost(self) -> float:
        """The points that the worst value costs."""
        return max(self.best.values()) - min(self.best.values())


def by_value(result: CellResult) -> ByValue | None:
    """Of a complete grid: by E_free in percent of the epochs, or else by weight decay; None of one without either."""
    assert result.study is not None
    axes, epochs = result.study.grid.axes, result.study.grid.config.train.epochs
    scales = {"optim.free_epochs": 100 / epochs, "optim.weight_decay": 1.0}
    key = next((key for key in scales if key in axes), None)
    if key is None:
        return None
    axis = list(axes).index(key)
    best: dict[str, float] = {}
    for point, (_, record) in zip(result.study.grid.points, result.tried, strict=True):
        value = f"{float(axes[key][point[axis]]) * scales[key]:.4g}"
        best[value] = max(score(record), best.get(value, 0.0))
    return ByValue("E_free, % of the epochs" if key == "optim.free_epochs" else "weight decay", best)


def costs(experiment: Experiment, found: list[CellResult]) -> list[str]:
    """Sentences on how much the choice of E_free matters, and that of the weight decay."""
    complete = [(result.cell, by_value(result)) for result, _ in best_of_curves(found)]
    at = {(cell.panel, cell.column, cell.row): tried for cell, tried in complete if tried is not None}
    lines = []
    for base, rival in experiment.pairs:
        both = [(at[*p, base], at[*p, rival]) for p in places(found) if {(*p, base), (*p, rival)} <= set(at)]
        if len(both) > 1:
            winners = sorted({ours.winner for _, ours in both})
            best = " to ".join(f"{winner:g}" for winner in dict.fromkeys((winners[0], winners[-1])))
            decay, free = ([pair[k].cost for pair in both] for k in (0, 1))
            lines.append(
                f"{rival} beside {base}, {len(both)} grids: the best E_free is {best} % of the epochs. The worst value "
                f"tried costs {sum(free) / len(both):.2f} points on average and at most {max(free):.2f}; the worst "
                f"weight decay {sum(decay) / len(both):.2f} and {max(decay):.2f}."
            )
    return lines


def _values_table(complete: list[tuple[CellResult, BestOf]], split: str) -> Table | None:
    head = ("", "", "hyperparameter", f"best {split} score at each value, %", "the worst costs")
    rows = []
    for result, _ in complete:
        if (tried := by_value(result)) is not None:
            scores = "; ".join(f"{value}: {best:.2f}" for value, best in tried.best.items())
            where = place(result.cell.panel, result.cell.column)
            rows.append([where, result.cell.row, tried.hyperparameter, scores, f"{tried.cost:.2f}"])
    return Table(head, rows) if rows else None


def _frame(complete: list[tuple[CellResult, BestOf]]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "panel": result.cell.panel,
            "column": result.cell.column,
            "row": result.cell.row,
            "epochs": result.epochs,
            "k": k + 1,
            "mean": curve.mean[k],
            "low": curve.low[k],
            "high": curve.high[k],
        }
        for result, curve in complete
        for k in range(len(curve.mean))
    )


def _winners(found: list[CellResult], best: Best) -> list[str]:
    """A sentence on the best row with K trials in each column."""
    parts = []
    for panel, column in places(found):
        here = {row: curve for (p, c, row), curve in best.items() if (p, c) == (panel, column)}
        if len(here) > 1:
            first, second, *_ = sorted(here, key=lambda row: -here[row].mean[K - 1])
            schedule = "" if panel == SHORT else f", {panel.partition(', ')[2]}"
            parts.append(
                f"{column}{schedule}: {first} ({here[first].mean[K - 1]:.2f}), then {second} "
                f"({here[second].mean[K - 1]:.2f})"
            )
    return [f"Best with {K} trials: {'; '.join(parts)}."] if parts else []


def _easier(experiment: Experiment, found: list[CellResult], best: Best) -> list[str]:
    """Sentences on whether E_free is easier to tune than decay."""
    lines = []
    for base, rival in experiment.pairs:
        both = [
            (best[panel, column, base], best[panel, column, rival])
            for panel, column in places(found)
            if {(panel, column, base), (panel, column, rival)} <= set(best)
        ]
        if both:
            few = sum(b.mean[K - 1] > a.mean[K - 1] for a, b in both)
            many = sum(b.mean[-1] > a.mean[-1] for a, b in both)
            missed = [sum(pair[i].mean[-1] - pair[i].mean[K - 1] for pair in both) / len(both) for i in (0, 1)]
            lines.append(
                f"{rival} against {base}: better with {K} trials in {few} of {len(both)} columns, with the whole "
                f"grid in {many}. With {K} trials {rival} is {missed[1]:.2f} points below its best on average, "
                f"{base} {missed[0]:.2f}."
            )
    return lines


def _filters(complete: list[tuple[CellResult, BestOf]]) -> list[str]:
    """A sentence on the short schedule as a filter, for each cell whose whole grid was run on both schedules."""
    at = {(o.cell.panel, o.cell.column, o.cell.row): o for o, _ in complete}
    lines = []
    for (panel, column, row), full in at.items():
        short = at.get((SHORT, column, row))
        if panel == FULL and short is not None:
            lines.append(_filtered(full, short))
    return lines


def _written(found: BestOf) -> str:
    k = K - 1
    return f"{found.mean[k]:.2f} ({found.low[k]:.2f} to {found.high[k]:.2f})"


def _filtered(full: CellResult, short: CellResult) -> str:
    """How good a filter the short schedule is, in a sentence or two."""
    assert full.study is not None
    points = full.study.grid.points
    ours, theirs = (
        {point: score(record) for point, (_, record) in zip(points, result.tried, strict=True)}
        for result in (full, short)
    )
    by_full, by_short = search.ranked(points, ours.get), search.ranked(points, theirs.get)
    limit = search.num_trials(len(full.study.grid.axes))
    tried = search.points_to_try(full.study.grid.shape, by_short, limit, ours.get, ours.__contains__)
    found = search.ranked(tried, ours.get)[0]
    scores = pd.DataFrame({"full": [ours[point] for point in points], "short": [theirs[point] for point in points]})
    correlation = scores.rank().corr().iloc[0, 1]  # Spearman's
    return (
        f"{full.cell.row} at {full.cell.column}: of {len(points)} settings the best after {full.epochs} epochs "
        f"({ours[by_full[0]]:.2f}) has rank {by_short.index(by_full[0]) + 1} after {short.epochs}, and the best "
        f"after {short.epochs} gets {ours[by_short[0]]:.2f} after {full.epochs} (rank "
        f"{by_full.index(by_short[0]) + 1}; rank correlation {correlation:.2f}). Within the grid, the search "
        f"that starts from the short ranking finds rank {by_full.index(found) + 1} ({ours[found]:.2f}) with "
        f"{len(tried)} runs."
    )
