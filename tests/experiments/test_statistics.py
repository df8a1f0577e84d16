"""Statistics against SciPy, closed forms and enumeration; their error rates by simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from experiments.reporting.statistics import (
    Comparison,
    best_of,
    compare,
    compare_paired,
    holm,
    mean_and_error,
)


def hits(rng: np.random.Generator, seeds: int, users: np.ndarray, spread: float, shift: float = 0.0) -> np.ndarray:
    """HR@10 of runs, in percent: users have a taste, runs have a level."""
    level = rng.normal(shift, spread, (seeds, 1))
    return 100.0 * (rng.normal(size=(seeds, len(users))) < users + level)


def test_standard_error_is_that_of_drawing_users_and_seeds():
    """Users with their means, and seeds with theirs less what the luck of users in runs is."""
    rng = np.random.default_rng(0)
    ours, theirs = (hits(rng, seeds, np.zeros(200), 0.3) for seeds in (6, 4))
    found = compare_paired(ours, theirs)
    users = ours.shape[1]
    differences = ours.mean(0) - theirs.mean(0)
    drawn = np.stack([rng.choice(differences, users).mean() for _ in range(20_000)])
    for arm, sign in ((ours, 1), (theirs, -1)):
        seeds = len(arm)
        luck = arm - arm.mean(0) - arm.mean(1, keepdims=True) + arm.mean()
        explained = (luck**2).sum() / (seeds - 1) / (users - 1) / users
        means = arm.mean(1) - arm.mean()
        levels = means * np.sqrt((means.var(ddof=1) - explained) / means.var())
        drawn += sign * rng.choice(levels, (len(drawn), seeds)).mean(1)
    assert found.difference == pytest.approx(ours.mean() - theirs.mean())
    assert found.error == pytest.approx(drawn.std(), rel=0.02)


def test_degrees_of_freedom_are_those_of_the_mean_squares():
    """By the two-way table of each arm, and the variance that the square of the error has over repetitions."""
    rng = np.random.default_rng(4)
    users = rng.normal(0.4, 1.0, 100)
    arms = [hits(rng, seeds, users, 0.5) for seeds in (20, 12)]
    found = compare_paired(*arms)
    spread = np.var(arms[0].mean(0) - arms[1].mean(0), ddof=1) ** 2 / 100**2 / 99
    for arm in arms:
        seeds, n = arm.shape
        of_seeds = n * sum((row.mean() - arm.mean()) ** 2 for row in arm) / (seeds - 1)
        total = ((arm - arm.mean()) ** 2).sum()
        of_users = seeds * sum((column.mean() - arm.mean()) ** 2 for column in arm.T)
        of_luck = (total - of_seeds * (seeds - 1) - of_users) / ((seeds - 1) * (n - 1))
        spread += (of_seeds / (seeds * n)) ** 2 / (seeds - 1) + (of_luck / (seeds * n)) ** 2 / ((seeds - 1) * (n - 1))
    assert found.df == pytest.approx(found.error**4 / spread)
    again = [compare_paired(*(hits(rng, len(arm), users, 0.5) for arm in arms)) for _ in range(1000)]
    squares = np.array([comparison.error**2 for comparison in again])
    assert np.median([c.df for c in again]) == pytest.approx(2 * squares.mean() ** 2 / squares.var(), rel=0.25)


def test_no_fewer_degrees_of_freedom_than_seeds_have():
    """Two runs whose means differ, and no luck."""
    ours = np.array([[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]])
    assert compare_paired(ours, np.zeros((9, 3))).df == pytest.approx(1)


def test_two_runs_of_two_users_each_may_be_told_apart():
    ours = np.array([[1.0, 2.0], [1.0, 2.0]])
    found = compare_paired(ours, ours - 1)
    assert (found.difference, found.error, found.p) == (1, 0, 0)
    assert compare_paired(ours, ours).p == 1


@pytest.mark.parametrize(("ours", "theirs"), [((1, 9), (3, 9)), ((3, 9), (3, 8)), ((3, 1), (3, 1)), ((9,), (9,))])
def test_too_little_to_compare(ours, theirs):
    with pytest.raises(ValueError, match="need"):
        compare_paired(np.zeros(ours), np.zeros(theirs))


@pytest.mark.parametrize("seeds", [3, 8])
@pytest.mark.parametrize("spread", [0.0, 0.06, 0.4])
def test_null_data_give_five_percent_of_false_positives(spread, seeds):
    """Runs that differ as their users' luck explains, more, and mostly for other reasons. It is less than 5 % where
    the variance between seeds is often estimated to be 0."""
    rng = np.random.default_rng(1)
    runs = 1500
    wrong = 0
    for _ in range(runs):
        users = rng.normal(0.4, 1.0, 300)
        wrong += compare_paired(*(hits(rng, seeds, users, spread) for _ in range(2))).p < 0.05
    assert wrong / runs <= 0.05 + 2.5 * math.sqrt(0.05 * 0.95 / runs)
    assert wrong / runs >= (0.005 if spread < 0.4 else 0.045 - 2.5 * math.sqrt(0.05 * 0.95 / runs))


def test_intervals_hold_the_difference():
    rng = np.random.default_rng(2)
    runs = 1000
    held, found = 0, 0
    for _ in range(runs):
        users = rng.normal(0.4, 1.0, 300)
        arms = hits(rng, 8, users, 0.06, shift=0.2), hits(rng, 8, users, 0.06)
        likely = [stats.norm.cdf((0.4 + shift) / math.sqrt(2 + 0.06**2)) for shift in (0.2, 0.0)]
        low, high = compare_paired(*arms).interval()
        held += low <= 100 * (likely[0] - likely[1]) <= high
        found += low > 0
    assert 0.95 - 2.5 * math.sqrt(0.05 * 0.95 / runs) <= held / runs
    assert found / runs > 0.5


@given(st.floats(-5, 5), st.floats(0.01, 3), st.floats(2, 200))
def test_p_and_interval_agree(difference, error, df):
    found = Comparison(difference, error, df)
    assume(found.p > 1e-6)
    low, high = found.interval(1 - found.p)
    assert min(abs(low), abs(high)) < 1e-6


def test_welchs_test_is_scipys():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=8), rng.normal(size=6)
    theirs = stats.ttest_ind(a, b, equal_var=False)
    ours = compare(a, b)
    assert (ours.difference, ours.df) == (pytest.approx(a.mean() - b.mean()), pytest.approx(theirs.df))
    assert ours.p == pytest.approx(theirs.pvalue)
    assert ours.interval() == pytest.approx(tuple(theirs.confidence_interval()))


def test_seeds_needed_from_arms_of_other_sizes():
    """Variances 1 and 1 with 8 and 24 seeds are those of 12 and 12."""
    spread = np.array([-1.0, 1.0]) * math.sqrt(1 / 2)  # a sample of two with the variance 1
    few, many = (np.tile(spread, n // 2) * math.sqrt((n - 1) / (n / 2)) for n in (8, 24))
    gain = compare(few + 1.0, many)
    assert (few.var(ddof=1), many.var(ddof=1)) == (pytest.approx(1), pytest.approx(1))
    assert gain.seeds == pytest.approx(12)
    equal = compare(few + 1.0, few)
    assert equal.seeds == 8
    assert gain.seeds_needed(1.0) == equal.seeds_needed(1.0) == 17
    rng = np.random.default_rng(5)
    ours, theirs = 100.0 * (rng.random((2, 3, 50)) < 0.5)
    assert compare_paired(ours, theirs).seeds == pytest.approx(3)
    assert 3 < compare_paired(ours, np.concatenate([theirs, theirs, ours])).seeds < 9


def test_seeds_of_equal_means_count_by_their_luck():
    runs = np.stack([np.random.default_rng(seed).permutation(32) for seed in range(8)]).astype(float)
    assert 2 < compare_paired(runs[:2], runs).seeds < 8


@pytest.mark.parametrize("difference", [-12.0, 9.5, 20.0])
def test_seeds_needed_have_the_power_and_one_fewer_has_not(difference):
    """The test samples stay the same: a part of the error, 3, is there with any number of seeds."""

    def power(seeds: int) -> float:
        error, df = math.sqrt(3**2 + (5**2 - 3**2) * 4 / seeds), 2 * (seeds - 1)
        return float(stats.nct.sf(stats.t.ppf(0.975, df), df, abs(difference) / error))

    gain = Comparison(0.0, 5.0, 6, floor=3.0, seeds=4)
    needed = gain.seeds_needed(difference)
    assert power(needed - 1) < 0.8 <= power(needed)
    assert gain.seeds_needed(8.0) == math.inf  # 3 times 2.8


def test_a_thousand_seeds_are_the_most():
    gain, enough = Comparison(0.0, 1.0, 18, seeds=10), Comparison(0.0, 0.1, 1998).detectable()
    assert gain.seeds_needed(enough) == 1000
    assert gain.seeds_needed(0.999 * enough) == math.inf


def test_the_error_with_any_number_of_seeds_by_hand():
    """Users differ by 6 on average, which gives 3; of its square, 1 is the luck of users in two runs."""
    found = compare_paired(np.array([[7.0, -1.0], [5.0, 1.0]]), np.zeros((2, 2)))
    assert (found.error, found.floor) == (pytest.approx(3), pytest.approx(math.sqrt(8)))
    assert compare_paired(np.array([[1.0, -1.0], [-1.0, 1.0]]), np.zeros((2, 2))).floor == 0


def test_two_seeds_may_be_enough():
    assert Comparison(0.0, 1.0, 14, seeds=8).seeds_needed(1e6) == 2


def test_welchs_test_by_hand():
    """Means 2 and 5, variances 1 and 4, n = 3: t = 3 / sqrt(5/3), 50/17 degrees of freedom."""
    found = compare(np.array([1.0, 2.0, 3.0]), np.array([3.0, 5.0, 7.0]))
    assert (found.difference, found.df) == (-3, pytest.approx(50 / 17))
    assert found.p == pytest.approx(2 * stats.t.sf(3 / math.sqrt(5 / 3), 50 / 17))


@pytest.mark.parametrize(("a", "b"), [([1.0], [2.0, 3.0]), ([1.0, 1.0], [2.0, 2.0])])
def test_nothing_is_known_without_spread(a, b):
    found = compare(np.array(a), np.array(b))
    assert found.difference < 0
    assert all(map(math.isnan, (found.error, found.p, *found.interval(), found.detectable())))


def test_one_arm_without_spread():
    found = compare(np.array([2.0, 2.0]), np.array([1.0, 2.0, 6.0]))
    assert (found.error, found.df) == (pytest.approx(math.sqrt(7 / 3)), pytest.approx(2))


@pytest.mark.parametrize("df", [1.0, 6.0, 14.0, 1e6])
def test_detectable_difference_is_found_with_its_power(df):
    shift = Comparison(0.0, 2.0, df).detectable()
    if df == 1e6:
        assert shift == pytest.approx(2.0 * (stats.norm.ppf(0.975) + stats.norm.ppf(0.8)), rel=1e-4)
    rng = np.random.default_rng(4)
    t = (rng.normal(shift / 2.0, 1, 40_000)) / np.sqrt(rng.chisquare(df, 40_000) / df)
    assert (np.abs(t) > stats.t.ppf(0.975, df)).mean() == pytest.approx(0.8, abs=0.01)


def test_holm_by_hand():
    """Holm (1979): 4 x 0.005, 3 x 0.01, 2 x 0.03, then the largest so far."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.9, 0.4]) == pytest.approx([0.9, 0.8])
    assert holm([0.9, 0.6]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_its_step_down_rejects(p):
    adjusted = holm(p)
    assert all(a >= q for a, q in zip(adjusted, p, strict=True))
    for level in (0.01, 0.05, 0.5):
        rejected = set()
        for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
            if p[i] > level / (len(p) - rank) * (1 + 1e-12):
                break
            rejected.add(i)
        assert rejected == {i for i, a in enumerate(adjusted) if a <= level * (1 + 1e-12)}


def test_holm_errs_at_all_in_five_percent():
    rng = np.random.default_rng(5)
    assert np.mean([min(holm(list(rng.uniform(size=12)))) < 0.05 for _ in range(4000)]) == pytest.approx(
        0.05, abs=0.011
    )


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=7))
def test_best_of_k_is_the_mean_over_all_draws(scores):
    found = best_of(scores)
    for k in range(1, len(scores) + 1):
        best = sorted(max(drawn) for drawn in itertools.combinations(scores, k))
        assert found.mean[k - 1] == pytest.approx(np.mean(best), abs=1e-9)
        for end, share in ((found.low, 0.1), (found.high, 0.9)):
            assert end[k - 1] == best[max(0, math.ceil(share * len(best) - 1e-9) - 1)]
    assert found.mean[-1] == max(scores)


def test_best_of_trials_that_diverged():
    found = best_of([60.0, -math.inf, 70.0])
    assert found.mean.tolist() == [-math.inf, pytest.approx(200 / 3), 70]
    with pytest.raises(ValueError, match="no scores"):
        best_of([])


@given(st.floats(-1e3, 1e3), st.integers(2, 9))
def test_equal_values_have_no_error(value, count):
    """Their mean may differ from them by rounding."""
    assert mean_and_error([value] * count) == (pytest.approx(value), 0.0)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9))
def test_mean_and_error_are_scipys(values):
    assume(np.ptp(values) > 1e-6)
    assert mean_and_error(values) == pytest.approx((np.mean(values), stats.sem(values)), rel=1e-6)
