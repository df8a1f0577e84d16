"""Tuning curves: how good the best of k random settings is, for every optimizer and batch size of table 4."""

from functools import cached_property

import pandas as pd
from scipy.stats import spearmanr

from experiments.definitions.spec import Measure
from experiments.definitions.tuning_curves import FULL, SHORT
from experiments.planning import search
from experiments.records import Record
from experiments.reporting.layout import Entry
from experiments.reporting.outcomes import Outcome, places
from experiments.reporting.page import Page, provenance
from experiments.reporting.statistics import BestOf, best_of

K = 5  # trials that a user may afford


class CurvesPage(Page):
    """What the grids say, and not what fills a cell."""

    source, source_title = "tuning/tuning_curves.csv", "Every run"

    @cached_property
    def curves(self) -> list[tuple[Outcome, BestOf]]:
        return curves(self.found)

    @cached_property
    def _best(self) -> dict[tuple[str, str, str], BestOf]:
        return {(o.cell.panel, o.cell.column, o.cell.row): found for o, found in self.curves}

    @property
    def shown(self) -> bool:
        return bool(self.curves)

    def _entry(self, outcome: Outcome, measure: Measure, cells: list[Outcome]) -> Entry:
        found = self._best.get((outcome.cell.panel, outcome.cell.column, outcome.cell.row))
        return Entry("" if found is None else _written(found), "", "", False, [])

    @property
    def measured(self) -> str:
        return (
            f"The best validation HR@10, %, that {K} random settings of a grid are expected to find, and in brackets "
            "the interval that holds it with 80 % probability, over the draw of settings: in closed form, from one run "
            "with seed 0 of every setting of the grid. A setting that diverged counts as 0."
        )

    @property
    def provenance(self) -> str:
        return provenance([record for outcome in self.found for _, record in outcome.tried])

    @property
    def frame(self) -> pd.DataFrame:
        return pd.DataFrame(
            {
                "panel": outcome.cell.panel,
                "column": outcome.cell.column,
                "row": outcome.cell.row,
                "epochs": outcome.epochs,
                "k": k + 1,
                "mean": found.mean[k],
                "low": found.low[k],
                "high": found.high[k],
            }
            for outcome, found in self.curves
            for k in range(len(found.mean))
        )

    @property
    def summary(self) -> list[str]:
        return [*self._easier(), *self._winners(), *self._filter()]

    def _winners(self) -> list[str]:
        """Who leads with K trials in each column, in a sentence."""
        parts = []
        for panel, column in places(self.found):
            here = {row: found for (p, c, row), found in self._best.items() if (p, c) == (panel, column)}
            if len(here) > 1:
                first, second, *_ = sorted(here, key=lambda row: -here[row].mean[K - 1])
                schedule = "" if panel == SHORT else f", {panel.partition(', ')[2]}"
                parts.append(
                    f"{column}{schedule}: {first}, {here[first].mean[K - 1]:.2f}, before {second}, "
                    f"{here[second].mean[K - 1]:.2f}"
                )
        return [f"Ahead with {K} trials: {'; '.join(parts)}."] if parts else []

    def _easier(self) -> list[str]:
        """Whether E_free is easier to tune than decay."""
        lines = []
        for base, rival in self.experiment.pairs:
            both = [
                (self._best[panel, column, base], self._best[panel, column, rival])
                for panel, column in places(self.found)
                if {(panel, column, base), (panel, column, rival)} <= set(self._best)
            ]
            if both:
                few = sum(b.mean[K - 1] > a.mean[K - 1] for a, b in both)
                many = sum(b.mean[-1] > a.mean[-1] for a, b in both)
                missed = [sum(pair[i].mean[-1] - pair[i].mean[K - 1] for pair in both) / len(both) for i in (0, 1)]
                lines.append(
                    f"{rival} against {base}: better with {K} trials in {few} of {len(both)} columns, with the whole "
                    f"grid in {many}. With {K} trials {rival} misses {missed[1]:.2f} points of its best on average, "
                    f"{base} {missed[0]:.2f}."
                )
        return lines

    def _filter(self) -> list[str]:
        """What the short schedule says of the whole one, where the whole grid was run for both."""
        complete = {(o.cell.panel, o.cell.column, o.cell.row): o for o, _ in self.curves}
        lines = []
        for (panel, column, row), full in complete.items():
            short = complete.get((SHORT, column, row))
            if panel == FULL and short is not None:
                lines.append(_filtered(full, short))
        return lines


def curves(found: list[Outcome]) -> list[tuple[Outcome, BestOf]]:
    """Of the grids that are complete."""
    complete = [outcome for outcome in found if outcome.tried and len(outcome.tried) == len(outcome.tuning.full)]
    return [(outcome, best_of([_score(record) for _, record in outcome.tried])) for outcome in complete]


def _score(record: Record) -> float:
    """Of a setting that diverged: 0, as of a model that recommends nothing."""
    return 0.0 if record.diverged else record.headline


def _written(found: BestOf) -> str:
    k = K - 1
    return f"{found.mean[k]:.2f} ({found.low[k]:.2f} to {found.high[k]:.2f})"


def _filtered(full: Outcome, short: Outcome) -> str:
    """How good a filter the short schedule is, in a sentence or two."""
    assert full.study is not None
    points = full.study.grid.points
    ours, theirs = (
        {point: _score(record) for point, (_, record) in zip(points, outcome.tried, strict=True)}
        for outcome in (full, short)
    )
    by_full, by_short = search.ranked(points, ours.get), search.ranked(points, theirs.get)
    limit = search.trials(full.study.grid.shape)
    tried = search.explore(full.study.grid.shape, by_short, limit, ours.get, ours.__contains__)
    found = search.ranked(tried, ours.get)[0]
    correlation = spearmanr([ours[point] for point in points], [theirs[point] for point in points]).statistic
    return (
        f"{full.cell.row} at {full.cell.column}: of {len(points)} settings the best after {full.epochs} epochs "
        f"({ours[by_full[0]]:.2f}) stood at place {by_short.index(by_full[0]) + 1} after {short.epochs}, and the best "
        f"after {short.epochs} gets {ours[by_short[0]]:.2f} after {full.epochs} (place "
        f"{by_full.index(by_short[0]) + 1}; rank correlation {correlation:.2f}). The search that starts from the short "
        f"order finds place {by_full.index(found) + 1} ({ours[found]:.2f}) with {len(tried)} runs."
    )
