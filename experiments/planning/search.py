"""The search of hyperparameters on a grid: the next points to try, from the scores of those that were tried.

1. Every point of the grid for a short budget, a complete schedule each.
2. Trials for the whole budget, as many for each optimizer: first the BEST of the short ones, then again and again the
   neighbours of the BEST so far, without those that diverged. They may lie one value beyond an end of the grid. Where
   no neighbour is left, the next best of the short ones follow. Without a shorter budget all points are tried, then
   the neighbours beyond the ends.
3. The BEST of these once more with other seeds. A point that diverges or collapses for one of them loses, and the next
   best takes its place; of those that remain the best mean wins.

The same for every optimizer. Nothing here is random, and a step depends on scores alone, so that a killed search
resumes from its records.
"""

from collections.abc import Callable, Sequence
from itertools import product
from math import inf, isnan

Point = tuple[int, ...]  # the index of each axis' value; -1 and the length of an axis are beyond its ends
Score = Callable[[Point], float | None]  # the larger the better, NaN of a diverged run; None: not known yet

BEST = 3
AXES = 3  # of the grids of LAWN, and of most others
CONFIRMING_SEEDS = (1, 2)  # beside 0, which all trials have
COLLAPSED = 0.5  # of a point's best seed: a lower score is another outcome, not a little worse


def grid(shape: Sequence[int]) -> list[Point]:
    return list(product(*map(range, shape)))


def neighbours(point: Point, shape: Sequence[int]) -> list[Point]:
    """One step along one axis, to at most one beyond its ends."""
    moved = [(k, i + step) for k, i in enumerate(point) for step in (-1, 1)]
    return [(*point[:k], i, *point[k + 1 :]) for k, i in moved if -1 <= i <= shape[k]]


def num_trials(axes: int) -> int:
    """The number of points to try with the whole budget after a search with a shorter one.

    It is the number of neighbours of the BEST on AXES axes, so that a baseline with fewer hyperparameters than LAWN has
    no fewer trials. Of more axes, it is that of theirs.
    """
    return 2 * BEST * max(axes, AXES)


def points_to_try(
    shape: Sequence[int],
    start: Sequence[Point],
    limit: int | None,
    score: Score,
    possible: Callable[[Point], bool] = lambda _: True,
) -> list[Point]:
    """The points to try with the whole budget, as far as they follow from the known scores.

    `possible` is False for points beyond an end of the grid that cannot be run, or are the run of another point.

    `start`: the points of the grid, in the order of a shorter budget, the best first; at most `limit` points are tried.
    Without a limit all of the grid are, in one step.
    """
    tried: list[Point] = []
    new = list(start[: min(BEST, limit)] if limit else start)
    while new:
        tried += new
        if any(score(point) is None for point in tried):
            break
        best = [point for point in ranked(tried, score)[:BEST] if _finite(score(point)) > -inf]
        near = [near for point in best for near in neighbours(point, shape)]
        new = [point for point in dict.fromkeys(near) if point not in tried and possible(point)]
        if limit:
            new = (new or [point for point in start if point not in tried][:BEST])[: limit - len(tried)]
    return tried


def ranked(points: Sequence[Point], score: Score) -> list[Point]:
    """Sorted from best to worst score, diverged points last; a stable sort."""
    return sorted(points, key=lambda point: -_finite(score(point)))


def points_to_confirm(best: Sequence[Point], scores: Callable[[Point], list[float | None]]) -> list[Point]:
    """The points to run with all seeds, from `best` in its order: until BEST of them are stable, at most 2 BEST."""
    asked: list[Point] = []
    stable = 0
    for point in best[: 2 * BEST]:
        if stable == BEST:
            break
        asked.append(point)
        stable += None in scores(point) or is_stable([value for value in scores(point) if value is not None])
    return asked


def is_stable(scores: Sequence[float]) -> bool:
    """Whether no seed diverged or collapsed."""
    return not any(map(isnan, scores)) and min(scores) >= COLLAPSED * max(scores)


def best_point(confirmed: Sequence[Point], scores: Callable[[Point], list[float]]) -> Point:
    """The point with the best mean among the stable points, or among all if none is stable."""
    return max(confirmed, key=lambda point: (is_stable(scores(point)), mean(scores(point))))


def mean(scores: Sequence[float]) -> float:
    return sum(map(_finite, scores)) / len(scores)


def _finite(score: float | None) -> float:
    """A diverged run is worse than any other."""
    return -inf if score is None or isnan(score) else score


def extrapolate(values: Sequence[str]) -> tuple[str | None, str | None]:
    """The values one step beyond both ends of an axis, by the ratio of the last two; None for an end at 0 and for a
    non-numeric axis."""
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        return None, None
    return _next(numbers[::-1]), _next(numbers)


def _next(numbers: Sequence[float]) -> str | None:
    if len(numbers) < 2 or not all(0 < number < inf for number in numbers[-2:]):
        return None
    return f"{numbers[-1] ** 2 / numbers[-2]:.6g}"
