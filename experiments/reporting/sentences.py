"""Sentences about the results of an experiment."""

from collections.abc import Iterable
from itertools import pairwise
from math import inf, isnan

from experiments.definitions.spec import Experiment
from experiments.planning import search
from experiments.reporting.cell_results import (
    CellResult,
    Pair,
    at_place,
    comparisons,
    gain,
    paper,
    place,
    places,
    same_data,
)
from experiments.reporting.layout import format_interval, format_signed
from experiments.reporting.statistics import mean_and_error

LEVEL = 0.05  # of significance
NO_TEST = "too few seeds for a test"
EXPLAINED_ERROR = 1.0  # points: a larger standard error of the headline metric needs an explanation


def against_the_best(experiment: Experiment, found: list[CellResult]) -> list[str]:
    """The compared row against the best of the other rows, a sentence for each column that has both."""
    measure = experiment.measures[0]
    lines, paired = [], []
    for panel, column in places(found):
        filled = [o for o in at_place(found, panel, column) if o.values(measure)]
        rival = next((o for o in filled if o.cell.row == experiment.compared_row), None)
        if rival is None:
            continue
        others = [o for o in filled if o is not rival and same_data([*rival.records, *o.records])]
        if not others:
            continue
        best = max(others, key=lambda o: measure.sign * o.mean(measure))
        (mean, error), (top, spread) = (mean_and_error(o.values(measure)) for o in (rival, best))
        found_gain, is_paired = gain(best, rival, measure)
        low, high = (f"{end:+.2f}" for end in found_gain.interval())
        known = ""
        if not isnan(found_gain.p):
            known = f" (95 % interval {low} to {high})"
            paired.append(is_paired)
        lines.append(
            f"On {place(panel, column)}, {rival.cell.row} gives {mean:.2f} ({error:.2f}); the best of the others "
            f"({best.cell.row}) gives {top:.2f} ({spread:.2f}); the gain is {found_gain.difference:+.2f}{known}."
            + _switches(rival)
        )
    if paired:
        lines.append(f"The intervals are those of {_method(paired)}, each by itself, without a correction.")
    return lines


def _switches(result: CellResult) -> str:
    """When runs with automatic E_free have fixed the norms, and how many never have; empty for other runs."""
    automatic = [last for record in result.records if "free_epochs" in (last := record.result["last"])]
    switched = sorted(last["free_epochs"] for last in automatic if last["constrained"])
    ends = dict.fromkeys(f"{epochs:.2f}" for epochs in (*switched[:1], *switched[-1:]))
    never = len(automatic) - len(switched)
    said = f" Norms were fixed after {' to '.join(ends)} epochs." if switched else ""
    return said + (f" In {never} of {len(automatic)} runs they never were fixed." if never else "")


def summary(experiment: Experiment, found: list[CellResult]) -> list[str]:
    """Comparisons and rankings against the paper's, in sentences; none where nothing can be compared."""
    if experiment.compared_row:
        return against_the_best(experiment, found)
    pairs = comparisons(experiment, found)
    lines = _one_comparison(pairs[0]) if len(pairs) == 1 else _all_comparisons(pairs)
    if experiment.figure == "horizon":
        lines += _over_horizons(experiment, found)
    lines += _shared(found) + _rankings(experiment, found) + _spread(experiment, found) + _devices(found)
    return lines + _the_papers_gains(_distinct(pairs)) + _where_the_paper_fails(experiment, found)


def _one_comparison(pair: Pair) -> list[str]:
    known = f"95 % interval {format_interval(pair.gain)}, p = {pair.gain.p:.2g}, {method([pair])}"
    said = NO_TEST if isnan(pair.gain.p) else known
    return [f"{pair.rival} against {pair.base}: {format_signed(pair.gain.difference)} ({said})."]


def _all_comparisons(pairs: list[Pair]) -> list[str]:
    """How often LAWN is better, whether the paper's signs agree, and what may mislead; none without pairs."""
    if not pairs:
        return []
    distinct = _distinct(pairs)
    lines = [_wins(pairs, distinct), *_signs_of_the_paper(distinct)]
    return lines + _below_paper([c for c in distinct if c.adjusted < LEVEL]) + _undone_by_the_correction(distinct)


def _wins(pairs: list[Pair], distinct: list[Pair]) -> str:
    ahead = [c for c in distinct if c.gain.difference > 0]
    behind = [c for c in distinct if c.gain.difference < 0]
    equal = len(distinct) - len(ahead) - len(behind)
    names = f" ({len(pairs)} by name: some are of the same runs)" if len(distinct) < len(pairs) else ""
    tested = [c for c in distinct if not isnan(c.gain.p)]
    return (
        f"With LAWN the number is better in {len(ahead)} of {len(distinct)} comparisons{names}{_small(ahead, tested)}, "
        + (f"exactly equal in {equal}, " if equal else "")
        + f"and worse in {len(behind)}{_small(behind, tested)}; "
        + (f"{method(tested)}, p after Holm's correction for {len(tested)} comparisons" if tested else NO_TEST)
        + (f"; in {len(distinct) - len(tested)}, {NO_TEST}." if 0 < len(tested) < len(distinct) else ".")
    )


def _signs_of_the_paper(pairs: list[Pair]) -> list[str]:
    printed = [c for c in pairs if not isnan(c.paper)]
    if not printed:
        return []
    agree = sum(c.sign > 0 for c in printed)
    differing = "; ".join(
        f"{c.rival} against {c.base} at {c.place} (here {format_signed(c.gain.difference)}, "
        f"{NO_TEST if isnan(c.adjusted) else f'p = {c.adjusted:.2g}'}, paper {format_signed(c.paper)})"
        for c in printed
        if c.sign < 0
    )
    return [
        f"The sign agrees with the paper in {agree} of the {len(printed)} comparisons that the paper has"
        + (f"; in {zero} a gain is zero" if (zero := sum(c.sign == 0 for c in printed)) else "")
        + (f"; it differs for: {differing}." if differing else ".")
    ]


def _small(pairs: list[Pair], tested: list[Pair]) -> str:
    return f" (p < {LEVEL} in {sum(c.adjusted < LEVEL for c in pairs)})" if tested else ""


def _distinct(pairs: list[Pair]) -> list[Pair]:
    """Comparisons of the same runs once."""
    return list({pair.key: pair for pair in sorted(pairs, key=lambda pair: not isnan(pair.paper))}.values())


def _below_paper(decided: list[Pair]) -> list[str]:
    """Where the side that loses does not reach the paper's number."""
    below = []
    for pair in decided:
        (row, difference), (other, others) = pair.loser, pair.winner
        if difference < 0:
            whole = pair.paper_epochs in (None, pair.epochs)
            after = "" if whole else f" after {pair.epochs} of {pair.paper_epochs} epochs"
            also = f" ({other} by {-others:.3g})" if others < 0 else ""
            below.append(f"{row} at {pair.place} by {-difference:.3g}{after}{also}")
    if not below:
        return []
    return [
        f"In {len(below)} of the {len(decided)} decided comparisons the losing side is below the paper's number and "
        f"may be tuned less well: {'; '.join(below)}."
    ]


def _undone_by_the_correction(pairs: list[Pair]) -> list[str]:
    """The comparisons that would be decided by themselves."""
    undone = [
        f"{c.rival} against {c.base} at {c.place} (p = {c.gain.p:.2g}, {c.adjusted:.2g} after it)"
        for c in pairs
        if c.gain.p < LEVEL <= c.adjusted
    ]
    if not undone:
        return []
    return [
        f"By itself, but not after the correction, p < {LEVEL}: {'; '.join(undone)}. The correction is for the "
        "comparisons of two seeds or more, so a further one can change what is decided."
    ]


def method(pairs: list[Pair]) -> str:
    """What was compared over what."""
    return _method([pair.paired for pair in pairs])


def _method(paired: Iterable[bool]) -> str:
    over_samples = "t-test over test samples and seeds, both random"
    welch = "Welch's test over seeds"
    kinds = dict.fromkeys(over_samples if each else welch for each in paired)
    return " or, where records have no outcomes of samples, ".join(sorted(kinds, reverse=True))


def _shared(found: list[CellResult]) -> list[str]:
    """The rows of a column that show the same runs, because the search chose the same setting for both."""
    lines = []
    for panel, column in places(found):
        rows: dict[str, list[str]] = {}  # by the first run
        for result in at_place(found, panel, column):
            if result.records:
                rows.setdefault(result.records[0].name, []).append(result.cell.row)
        lines += [
            f"At {place(panel, column)} the search chose the same setting for {' and '.join(map(repr, same))}: their "
            "numbers are of the same runs, and comparisons with them are not independent."
            for same in rows.values()
            if len(same) > 1
        ]
    return lines


def _over_horizons(experiment: Experiment, found: list[CellResult]) -> list[str]:
    """The order of the rows after each number of epochs, and what was chosen for each row."""
    measure = experiment.measures[0]
    lines = []
    for panel, column in places(found):
        here = [o for o in at_place(found, panel, column) if o.values(measure)]
        if len(here) > 1:
            rows = ((f"{o.cell.row} {o.mean(measure):.2f}", -measure.sign * o.mean(measure)) for o in here)
            lines.append(f"After {column}: {_order(rows)}.")
    for row in dict.fromkeys(o.cell.row for o in found):
        chosen = [f"{' '.join(o.setting)} for {o.cell.column}" for o in found if o.cell.row == row and o.setting]
        if len(chosen) > 1:
            lines.append(f"Chosen for {row}: {'; '.join(chosen)}.")
    return lines


def _spread(experiment: Experiment, found: list[CellResult]) -> list[str]:
    """Why a mean is uncertain, a sentence for each that is by more than EXPLAINED_ERROR points."""
    lines = []
    for result in found:
        values = sorted(record.headline for record in result.records if not result.failed)
        error = mean_and_error(values)[1]
        if experiment.measures[0].key != "headline" or not error > EXPLAINED_ERROR:
            continue
        low = [f"{value:.2f}" for value in values if value < search.COLLAPSED * values[-1]]
        why = f"; {len(low)} of {len(values)} collapsed" if low else ""
        lines.append(
            f"The standard error of {result.cell.name} is {error:.2f} points: its seeds give "
            f"{', '.join(f'{value:.2f}' for value in values)}{why}."
        )
    return lines


def _devices(found: list[CellResult]) -> list[str]:
    """The rows of a column whose runs are of a GPU, beside others of CPUs."""
    lines = []
    for panel, column in places(found):
        rows: dict[bool, list[str]] = {}
        for result in at_place(found, panel, column):
            on_cpu = {record.environment["device"] == "cpu" for record in result.records}
            if len(on_cpu) == 1:
                rows.setdefault(on_cpu.pop(), []).append(result.cell.row)
        if len(rows) == 2:
            lines.append(
                f"At {place(panel, column)}, the runs of {', '.join(rows[False])} are of a GPU, others of CPUs."
            )
    return lines


def _the_papers_gains(pairs: list[Pair]) -> list[str]:
    """Where the paper's gain is outside the interval of ours, of as many epochs."""
    known = [
        (pair, pair.gain.interval())
        for pair in pairs
        if not isnan(pair.paper) and not isnan(pair.gain.p) and pair.epochs == pair.paper_epochs
    ]
    outside = [
        f"{pair.rival} against {pair.base} at {pair.place} (paper {format_signed(pair.paper)}, here "
        f"{format_interval(pair.gain)})"
        for pair, (low, high) in known
        if not low <= pair.paper <= high
    ]
    if not outside:
        return []
    return [
        f"The paper's gain lies outside our 95 % interval in {len(outside)} of {len(known)} comparisons after as many "
        f"epochs: {'; '.join(outside)}. The intervals take it as exact."
    ]


def _where_the_paper_fails(experiment: Experiment, found: list[CellResult]) -> list[str]:
    """Our numbers where the paper prints "Fail"."""
    measure = experiment.measures[0]
    failed = [o for o in found if o.cell.paper is not None and o.cell.paper.value is None]
    ours = [
        f"{o.cell.name} {mean:.2f}" + ("" if isnan(error) else f" ({error:.2f})")
        for o in failed
        if o.values(measure)
        for mean, error in [mean_and_error(o.values(measure))]
    ]
    return [f'Where the paper prints "Fail", ours are: {"; ".join(ours)}.'] if ours else []


def _rankings(experiment: Experiment, found: list[CellResult]) -> list[str]:
    """The order of the rows in each column where all of the paper's rows have been run; what failed comes last."""
    measure = experiment.measures[0]
    lines = []
    for panel, column in places(found):
        here = [o for o in at_place(found, panel, column) if o.cell.paper is not None]
        if len(here) < 3 or not all(o.records for o in here) or len({o.epochs for o in here}) > 1:
            continue
        ours = _order((o.cell.row, -measure.sign * o.mean(measure)) for o in here)
        theirs = _order((o.cell.row, -measure.sign * paper(o.cell)) for o in here)
        same = "as in the paper" if ours == theirs else f"in the paper {theirs}"
        lines.append(f"Order of the paper's rows at {place(panel, column)}, by the mean: {ours}; {same}.")
    return lines


def _order(rows: Iterable[tuple[str, float]]) -> str:
    """Rows in the order of their means, the lowest first, with the signs between them."""
    ordered = sorted(rows, key=lambda row: inf if isnan(row[1]) else row[1])
    means = [f"{mean:.2f}" for _, mean in ordered]
    signs = ["", *(" = " if a == b else " > " for a, b in pairwise(means))]
    return "".join(f"{sign}{row}" for sign, (row, _) in zip(signs, ordered, strict=True))
