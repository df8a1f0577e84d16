"""What can be concluded from runs: intervals, corrections, the power of a comparison, the best of k trials."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan, nan, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, nctdtrinc, stdtr, stdtrit  # scipy.stats takes a second to import

Array = NDArray[np.float64]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of the mean; NaN where there are too few values."""
    array = np.asarray(values, float)
    mean = float(array.mean()) if len(array) else nan
    return mean, float(array.std(ddof=1) / np.sqrt(len(array))) if len(array) > 1 else nan


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Student's interval that holds the true mean with probability `level`; NaN where there are too few values."""
    mean, error = mean_and_error(values)
    half = float(stdtrit(len(values) - 1, (1 + level) / 2)) * error if len(values) > 1 else nan
    return mean - half, mean + half


@dataclass(frozen=True)
class Comparison:
    """A difference of two means with Student's t on `df` degrees of freedom."""

    difference: float
    error: float  # standard error
    df: float

    @property
    def p(self) -> float:
        """Two-sided p-value of no difference."""
        if self.error == 0:
            return 1.0 if self.difference == 0 else 0.0
        return float(2 * stdtr(self.df, -abs(self.difference) / self.error))

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        half = float(stdtrit(self.df, (1 + level) / 2)) * self.error
        return self.difference - half, self.difference + half

    def detectable(self, power: float = 0.8, level: float = 0.95) -> float:
        """The smallest true difference that a test with this standard error finds with probability `power`."""
        if isnan(self.error):
            return nan
        bound = stdtrit(self.df, (1 + level) / 2)
        return self.error * float(nctdtrinc(self.df, 1 - power, bound))  # the other tail adds less than 1e-5


def compare_paired(ours: Array, theirs: Array) -> Comparison:
    """The mean of `ours` minus that of `theirs`, each [seeds, users], over the same users and seeds of their own.

    The standard error is that of a bootstrap over users, who are the same in both arms, and over seeds, which are not,
    in closed form: the mean of a resample has the variance of what is drawn, over its number. A user's mean over seeds
    has some of the luck of a user in a run, and so has a seed's mean over users; to draw both as they are would count
    it more than once. So users are drawn with their means, which have it, and seeds with theirs shrunk by as much of
    their variance as it explains (Davison & Hinkley 1997, section 3.8). The degrees of freedom are Satterthwaite's, of
    the variance between users and of what is left of that between seeds.

    Raises ValueError for fewer than two seeds or users, and for users that are not the same in number.
    """
    if ours.ndim != 2 or theirs.ndim != 2 or ours.shape[1] != theirs.shape[1]:
        raise ValueError(f"need [seeds, users] with the same users, got {ours.shape} and {theirs.shape}")
    if min(*ours.shape, *theirs.shape) < 2:
        raise ValueError(f"need at least two seeds and two users, got {ours.shape} and {theirs.shape}")
    users = ours.shape[1]
    differences = ours.mean(0) - theirs.mean(0)  # [users]
    parts = [(float(differences.var(ddof=1)) / users, users - 1)]
    parts += [(_between(arm) / len(arm), len(arm) - 1) for arm in (ours, theirs)]
    return _comparison(float(differences.mean()), parts)


def compare(ours: Array, theirs: Array) -> Comparison:
    """The mean of `ours` minus that of `theirs`, a value for each seed: Welch's test. The error is NaN where one of
    them is a single value, or neither has any spread."""
    difference = float(ours.mean() - theirs.mean())
    if min(len(ours), len(theirs)) < 2 or (np.ptp(ours) == 0 and np.ptp(theirs) == 0):
        return Comparison(difference, nan, nan)
    return _comparison(difference, [(float(arm.var(ddof=1)) / len(arm), len(arm) - 1) for arm in (ours, theirs)])


def _comparison(difference: float, parts: list[tuple[float, int]]) -> Comparison:
    """From independent estimates of variances, and the degrees of freedom of each."""
    total = sum(part for part, _ in parts)
    df = total**2 / sum(part**2 / free for part, free in parts) if total > 0 else float(max(free for _, free in parts))
    return Comparison(difference, sqrt(total), df)


def _between(arm: Array) -> float:
    """The variance of runs that seeds alone explain."""
    seeds, users = arm.shape
    means = arm.mean(1) - arm.mean()
    luck = arm - arm.mean(0) - means[:, None]
    explained = (luck**2).sum() / ((seeds - 1) * (users - 1)) / users
    return max(0.0, float(means.var(ddof=1) - explained))


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


def best_of(scores: Sequence[float], level: float = 0.8) -> BestOf:
    """Expected best of k random trials and the interval that holds it with probability `level`, in closed form.

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
    ends = [ordered[np.minimum((below < share - 1e-12).sum(1), n - 1)] for share in ((1 - level) / 2, (1 + level) / 2)]
    return BestOf(mean, *ends)


def _log_choose(n: NDArray[np.int64], k: NDArray[np.int64]) -> Array:
    """log C(n, k), where n >= k; anything elsewhere."""
    return np.asarray(gammaln(n + 1) - gammaln(k + 1) - gammaln(np.maximum(n - k, 0) + 1))
