"""What can be concluded from runs: intervals, corrections, the power of a comparison, the best of k trials."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isnan, nan, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, nctdtrinc, stdtr, stdtrit  # scipy.stats takes a second to import

Array = NDArray[np.float64]
MANY_SEEDS = 1000
CONFIDENCE, POWER = 0.95, 0.8
BEST_OF_CONFIDENCE = 0.8


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of the mean; NaN where there are too few values."""
    array = np.asarray(values, float)
    mean = float(array.mean()) if len(array) else nan
    differences = array - array[:1]  # all exactly 0 if the values are equal
    return mean, float(differences.std(ddof=1) / np.sqrt(len(array))) if len(array) > 1 else nan


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's interval that holds the true mean with probability CONFIDENCE; NaN where there are too few values."""
    mean, error = mean_and_error(values)
    half = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)) * error if len(values) > 1 else nan
    return mean - half, mean + half


@dataclass(frozen=True)
class Comparison:
    """A difference of two means with Student's t on `df` degrees of freedom."""

    difference: float
    error: float  # standard error
    df: float
    floor: float = 0.0  # the standard error with any number of seeds, on the same test samples
    seeds: float = nan  # as many in each arm would give this error, where the arms have different numbers

    @property
    def p(self) -> float:
        """Two-sided p-value of no difference."""
        if self.error == 0:
            return 1.0 if self.difference == 0 else 0.0
        return float(2 * stdtr(self.df, -abs(self.difference) / self.error))

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        half = float(stdtrit(self.df, (1 + confidence) / 2)) * self.error
        return self.difference - half, self.difference + half

    def detectable(self) -> float:
        """The smallest true difference that a test with this standard error finds with probability POWER."""
        return nan if isnan(self.error) else _detectable(self.error, self.df)

    def seeds_needed(self, difference: float) -> float:
        """How many seeds in each arm find a true `difference` with probability POWER; infinite where MANY_SEEDS do
        not."""
        of_seeds = max(0.0, self.error**2 - self.floor**2) * self.seeds

        def enough(n: int) -> bool:
            return _detectable(sqrt(self.floor**2 + of_seeds / n), 2 * (n - 1)) <= abs(difference)

        n = bisect_left(range(MANY_SEEDS + 1), True, lo=2, key=enough)
        return n if n <= MANY_SEEDS else inf


def _detectable(error: float, df: float) -> float:
    bound = stdtrit(df, (1 + CONFIDENCE) / 2)
    return error * float(nctdtrinc(df, 1 - POWER, bound))  # the other tail adds less than 1e-5


def compare_paired(ours: Array, theirs: Array) -> Comparison:
    """The mean of `ours` minus that of `theirs`, each [seeds, users], over the same users and seeds of their own.

    A score has a part of its user, which both arms share, one of its seed, and the luck of a user in a run. The
    standard error is that over other users and other seeds. The variance of a user's mean difference has the luck in
    it, and so has that of a seed's mean; the luck is counted once, so it is subtracted from the variance between seeds,
    which is at least 0 (analysis of variance with two random factors, Searle et al. 1992, chapter 4). The degrees of
    freedom are Satterthwaite's (1946), of the mean squares before the subtraction, and no fewer than those of the
    seeds.

    Raises ValueError for fewer than two seeds or users, and for users that are not the same in number.
    """
    if ours.ndim != 2 or theirs.ndim != 2 or ours.shape[1] != theirs.shape[1]:
        raise ValueError(f"need [seeds, users] with the same users, got {ours.shape} and {theirs.shape}")
    if min(*ours.shape, *theirs.shape) < 2:
        raise ValueError(f"need at least two seeds and two users, got {ours.shape} and {theirs.shape}")
    users = ours.shape[1]
    differences = ours.mean(0) - theirs.mean(0)  # [users]
    parts = [(float(differences.var(ddof=1)) / users, users - 1)]
    variance = of_users = parts[0][0]
    shares = []
    for arm in (ours, theirs):
        seeds, means = len(arm), arm.mean(1)
        luck = arm - arm.mean(0) - means[:, None] + arm.mean()
        of_seeds = float(means.var(ddof=1)) / seeds
        of_luck = float((luck**2).sum()) / ((seeds - 1) * (users - 1)) / (seeds * users)
        variance += max(0.0, of_seeds - of_luck)
        of_users -= of_luck
        shares.append(max(of_seeds, of_luck))
        parts += [(of_seeds, seeds - 1), (of_luck, (seeds - 1) * (users - 1))]
    least = min(len(ours), len(theirs)) - 1
    df = max(float(least), _df(variance, parts))
    return Comparison(
        float(differences.mean()), sqrt(variance), df, sqrt(max(0.0, of_users)), _equal_seeds((ours, theirs), shares)
    )


def compare(ours: Array, theirs: Array) -> Comparison:
    """The mean of `ours` minus that of `theirs`, a value for each seed: Welch's test. The error is NaN where one of
    them is a single value, or neither has any spread."""
    difference = float(ours.mean() - theirs.mean())
    if min(len(ours), len(theirs)) < 2 or (np.ptp(ours) == 0 and np.ptp(theirs) == 0):
        return Comparison(difference, nan, nan)
    parts = [(float(arm.var(ddof=1)) / len(arm), len(arm) - 1) for arm in (ours, theirs)]
    variance = sum(part for part, _ in parts)
    seeds = _equal_seeds((ours, theirs), [part for part, _ in parts])
    return Comparison(difference, sqrt(variance), _df(variance, parts), seeds=seeds)


def _equal_seeds(arms: Sequence[Array], shares: Sequence[float]) -> float:
    """As many seeds in each arm give the variance to which the arms, each with its own seeds, contribute `shares`."""
    total = sum(shares)
    return sum(len(arm) * share for arm, share in zip(arms, shares, strict=True)) / total if total > 0 else len(arms[0])


def _df(variance: float, parts: list[tuple[float, int]]) -> float:
    """Satterthwaite's degrees of freedom of a variance that is the sum, with signs, of estimates with their own."""
    spread = sum(part**2 / free for part, free in parts)
    return variance**2 / spread if spread > 0 else float(max(free for _, free in parts))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values: rejecting those up to a level errs at all with at most that probability."""
    adjusted = [0.0] * len(p)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted


@dataclass(frozen=True)
class BestOf:
    """The best score of k trials drawn without replacement from those made, for k = 1 to all of them: [trials] each."""

    mean: Array
    low: Array  # quantiles
    high: Array


def best_of(scores: Sequence[float]) -> BestOf:
    """Expected best of k random trials, and the interval that holds the best with probability BEST_OF_CONFIDENCE, in
    closed form.

    Of n scores in ascending order, the i-th is the best of k with probability C(i - 1, k - 1) / C(n, k) (Dodge et al.
    2019 have the same with replacement). The larger score is the better; a diverged trial is -inf, and an expectation
    that involves it is -inf.
    """
    if not scores:
        raise ValueError("no scores")
    ordered = np.sort(np.asarray(scores, dtype=float))
    n = len(ordered)
    i, k = np.arange(1, n + 1)[None, :], np.arange(1, n + 1)[:, None]
    chances = np.where(i >= k, np.exp(_log_choose(i - 1, k - 1) - _log_choose(np.full_like(i, n), k)), 0.0)
    below = np.cumsum(chances, axis=1)
    mean = np.where(chances > 0, chances * np.where(chances > 0, ordered, 0.0), 0.0).sum(1)
    shares = (1 - BEST_OF_CONFIDENCE) / 2, (1 + BEST_OF_CONFIDENCE) / 2
    ends = [ordered[np.minimum((below < share - 1e-12).sum(1), n - 1)] for share in shares]
    return BestOf(mean, *ends)


def _log_choose(n: NDArray[np.int64], k: NDArray[np.int64]) -> Array:
    """log C(n, k), where n >= k; anything elsewhere."""
    return np.asarray(gammaln(n + 1) - gammaln(k + 1) - gammaln(np.maximum(n - k, 0) + 1))
