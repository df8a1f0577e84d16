"""What stands at the top of the page: how much of the paper has been run, and what the records say, with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan

import numpy as np

from experiments.definitions.tuning_curves import SHORT
from experiments.reporting.curves import K
from experiments.reporting.layout import format_signed
from experiments.reporting.outcomes import Pair, places
from experiments.reporting.page import Page
from experiments.reporting.statistics import Comparison, mean_interval
from experiments.reporting.trials import best_of_curves

FEW = 3  # comparisons that are listed by themselves


@dataclass(frozen=True)
class Finding:
    title: str
    text: str
    page: str  # name of the page that it is from


def coverage(pages: Sequence[Page]) -> str:
    """How many of the cells of the paper's tables have numbers of ours, in a sentence."""
    tables = [page for page in pages if page.name.startswith("table")]
    printed = [outcome for page in tables for outcome in page.outcomes if outcome.cell.paper is not None]
    filled = [outcome for outcome in printed if outcome.records]
    full = sum(outcome.epochs == outcome.cell.epochs[0] for outcome in filled)
    runs = {record.name for page in pages for outcome in page.outcomes for record in outcome.records}
    tried = {record.name for page in pages for outcome in page.outcomes for _, record in outcome.tried}
    return (
        f"{len(filled)} of the {len(printed)} numbers that the paper's tables print have one of ours beside them: "
        f"{full} at the paper's number of epochs, {len(filled) - full} at a shorter budget. The page shows {len(runs)} "
        f"final runs and {len(tried)} runs that chose hyperparameters."
    )


def findings(pages: Sequence[Page]) -> list[Finding]:
    """What the records say on the paper's claims; a claim without records is left out."""
    by_name = {page.name: page for page in pages}
    found = [_with_and_without([page for page in pages if page.name.startswith("table")])]
    for name, say in (("horizon", _horizon), ("tuning_curves", _tuning), ("figure1", _attenuated)):
        if name in by_name:
            found.append(say(by_name[name]))
    return [finding for finding in found if finding is not None]


def verdict(low: float, high: float) -> str:
    """What an interval of a gain says."""
    return "better" if low > 0 else "worse" if high < 0 else "not decided"


def _with_and_without(tables: Sequence[Page]) -> Finding | None:
    """The comparisons of the headline metric in all tables, in percent; those of the same runs, which have the same
    numbers under the names of several tables, are counted once.
    """
    measured: dict[Comparison, tuple[Page, Pair]] = {}
    for page in tables:
        if page.experiment is None or page.experiment.measures[0].key != "headline":
            continue
        for pair in page.pairs:
            if not isnan(pair.gain.p):
                measured.setdefault(pair.gain, (page, pair))
    if not measured:
        return None
    pairs = [pair for _, pair in measured.values()]
    intervals = [pair.gain.interval() for pair in pairs]
    if len(pairs) <= FEW:
        text = " ".join(f"{_sentence(pair)}." for pair in pairs)
    else:
        said = [verdict(*interval) for interval in intervals]
        text = (
            f"Of {len(pairs)} comparisons with LAWN and without, LAWN is better in {said.count('better')}, worse in "
            f"{said.count('worse')}, and {said.count('not decided')} are not decided: their 95 % intervals hold 0. "
            f"The gain is {format_signed(float(np.mean([p.gain.difference for p in pairs])))} on average "
            f"({_interval(*mean_interval([p.gain.difference for p in pairs]))}, over comparisons)."
        )
    return Finding(
        "Is LAWN better than what it is compared with, both tuned?", text, next(iter(measured.values()))[0].name
    )


def _horizon(page: Page) -> Finding | None:
    """The gain after each number of epochs."""
    known = [pair for pair in page.pairs if not isnan(pair.gain.p)]
    if not known:
        return None
    return Finding(
        "How does the gain change with the number of epochs?",
        " ".join(f"{_sentence(pair)}." for pair in known),
        page.name,
    )


def _tuning(page: Page) -> Finding | None:
    """How much more the best of K random settings is expected to give with LAWN, over the grids of short schedules."""
    best = {(o.cell.panel, o.cell.column, o.cell.row): curve for o, curve in best_of_curves(list(page.outcomes))}
    parts = []
    for base, rival in page.experiment.pairs if page.experiment else ():
        gains = [
            float(best[(*place, rival)].mean[K - 1] - best[(*place, base)].mean[K - 1])
            for place in places(page.outcomes)
            if place[0] == SHORT and {(*place, base), (*place, rival)} <= set(best)
        ]
        if len(gains) > 1:
            interval = mean_interval(gains)
            parts.append(
                f"{rival} against {base} {format_signed(float(np.mean(gains)))} points ({_interval(*interval)}, over "
                f"{len(gains)} batch sizes, each a grid with one seed): {verdict(*interval)}"
            )
    if not parts:
        return None
    text = f"Expected best of {K} random settings on the validation split: {'; '.join(parts)}."
    return Finding("Is E_free easier to tune than weight decay?", text, page.name)


def _attenuated(page: Page) -> Finding | None:
    known = [pair for pair in page.pairs if not isnan(pair.gain.p)]
    if not known:
        return None
    return Finding("Do attenuated logits keep a network adaptive?", f"{_sentence(known[0])}.", page.name)


def _sentence(pair: Pair) -> str:
    said = verdict(*pair.gain.interval())
    where = f", {pair.place}" if pair.place else ""
    printed = "" if isnan(pair.paper) else f"; the paper {format_signed(pair.paper)}"
    return (
        f"{pair.rival} against {pair.base}{where}: {format_signed(pair.gain.difference)} "
        f"({_interval(*pair.gain.interval())}; {pair.seeds[1]} and {pair.seeds[0]} seeds{printed}): {said}"
    )


def _interval(low: float, high: float) -> str:
    return f"95 % interval {format_signed(low)} to {format_signed(high)}"
