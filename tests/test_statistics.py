"""Statistics of a study, held against published examples, brute force and simulated studies."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest

from clframe.errors import DataError, UsageError
from clframe.experiments import statistics as st

# Hours of sleep gained with one drug over another, 10 patients (Cushny & Peebles; Student, 1908).
SLEEP = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
# Darwin's maize: cross-fertilized minus self-fertilized heights in eighths of an inch (Fisher, 1935, chapter 3).
MAIZE = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
# Spatial test data, A (Efron & Tibshirani, 1993, table 14.1).
SPATIAL = [48, 36, 20, 29, 42, 42, 20, 42, 22, 41, 45, 14, 6, 0, 33, 28, 34, 4, 32, 24, 47, 41, 24, 26, 30, 41]
# AUC of C4.5, with m, with cf, with both, on 14 data sets (Demšar, 2006, table 6). The paper ranks 0.975 and 0.975 of
# the 13th by digits that it does not print.
TREES = [
    [0.763, 0.768, 0.771, 0.798],
    [0.599, 0.591, 0.590, 0.569],
    [0.954, 0.971, 0.968, 0.967],
    [0.628, 0.661, 0.654, 0.657],
    [0.882, 0.888, 0.886, 0.898],
    [0.936, 0.931, 0.916, 0.931],
    [0.661, 0.668, 0.609, 0.685],
    [0.583, 0.583, 0.563, 0.625],
    [0.775, 0.838, 0.866, 0.875],
    [1.000, 1.000, 1.000, 1.000],
    [0.940, 0.962, 0.965, 0.962],
    [0.619, 0.666, 0.614, 0.669],
    [0.972, 0.981, 0.975 + 1e-6, 0.975],
    [0.957, 0.978, 0.946, 0.970],
]


# Intervals.


def test_student_s_interval_of_student_s_data():
    found = st.mean_interval(SLEEP)  # as R's t.test prints it
    assert (found.value, found.count) == (pytest.approx(1.58), 10)
    assert found.interval == pytest.approx((0.7001142, 2.4598858), abs=1e-7)
    half = 3.2498 * 1.229995 / math.sqrt(10)  # t of 9 degrees of freedom by the table, and s
    assert st.mean_interval(SLEEP, 0.99).interval == pytest.approx((1.58 - half, 1.58 + half), abs=1e-4)


def test_95_percent_intervals_of_8_normal_pairs_cover_95_percent():
    studies = np.random.default_rng(1).normal(0.3, 2.0, (10_000, 8))
    covered = 0
    for differences in studies:
        low, high = st.mean_interval(differences).interval
        covered += low <= 0.3 <= high
    assert 0.94 <= covered / len(studies) <= 0.96


def test_bca_interval_of_the_published_example():
    """Efron & Tibshirani, 1993, table 14.2: 90 % of the variance of A, from 2,000 bootstrap samples.

    Ends from 2,000 samples have standard deviations of 2.0 and 3.9, found over 200 seeds; 40,000 samples leave the
    example's own, of which two are allowed. The percentile interval, (100.8, 233.9) there, is far outside.
    """
    low, high = st.bca_interval(SPATIAL, 0.90, np.var, resamples=40_000)
    assert low == pytest.approx(115.8, abs=2 * 2.0)
    assert high == pytest.approx(259.6, abs=2 * 3.9)
    assert st.bca_interval(SPATIAL, 0.90, np.var) == st.bca_interval(SPATIAL[::-1], 0.90, np.var)


def test_bca_interval_of_a_mean_equals_its_definition():
    """The formula by itself: normal quantiles by the standard library, bootstrap samples of another generator."""
    from statistics import NormalDist

    normal = NormalDist()
    x = np.random.default_rng(2).lognormal(size=25)
    means = np.sort(x[np.random.default_rng(3).integers(25, size=(200_000, 25))].mean(1))
    z0 = normal.inv_cdf(np.mean(means < x.mean()))
    left = (x.sum() - x) / 24
    a = ((left.mean() - left) ** 3).sum() / (6 * ((left.mean() - left) ** 2).sum() ** 1.5)
    ends = []
    for z in (normal.inv_cdf(0.025), normal.inv_cdf(0.975)):
        ends.append(means[int(len(means) * normal.cdf(z0 + (z0 + z) / (1 - a * (z0 + z))))])
    assert st.bca_interval(x) == pytest.approx(ends, abs=0.06 * means.std() * 1.96)
    assert a > 0.05  # so that a plain percentile interval differs by more than the tolerance
    percentiles = np.quantile(means, [0.025, 0.975])
    assert min(abs(percentiles - ends)) > 0.06 * means.std() * 1.96


def test_bca_stands_beside_student_s_from_20_pairs_on():
    x = np.random.default_rng(4).normal(size=20)
    assert st.paired(x).bca == st.bca_interval(x)
    assert st.paired(x).interval == st.mean_interval(x).interval
    assert st.paired(x[:19]).bca is None
    assert st.paired(x[:19]).interval is not None
    assert st.paired(x, 0.5).bca[0] > st.paired(x).bca[0]


# The sign-flip test.


def brute_force(differences: list[int]) -> float:
    """The definition, on whole numbers: nothing is rounded."""
    vectors = list(itertools.product((-1, 1), repeat=len(differences)))
    observed = abs(sum(differences))
    return sum(abs(sum(e * d for e, d in zip(v, differences, strict=True))) >= observed for v in vectors) / len(vectors)


def test_sign_flips_of_fisher_s_example():
    """Fisher, 1935, section 21: 863 sign vectors give a sum of 314 or more, so that 1,726 of 32,768 count."""
    assert sum(MAIZE) == 314
    assert st.sign_flip_p(MAIZE) == 1726 / 32768


@pytest.mark.parametrize("seed", range(40))
def test_sign_flips_equal_brute_force_despite_rounding(seed: int):
    """Whole numbers up to 4 make many ties and zeros; as differences of accuracies they carry noise."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(-4, 5, size=rng.integers(1, 11)).tolist()
    base = rng.integers(0, 300, size=len(counts))
    noisy = [(b + d) / 360 - b / 360 for b, d in zip(base.tolist(), counts, strict=True)]
    assert st.sign_flip_p(counts) == st.sign_flip_p(noisy) == brute_force(counts)


def test_sign_flips_of_16_pairs_are_exact():
    counts = np.random.default_rng(5).integers(-9, 12, size=16).tolist()
    assert st.sign_flip_p(counts) == exact(counts)
    assert exact(MAIZE) == 1726 / 32768


def exact(differences: list[int]) -> float:
    """Count sums of sign vectors by value, for more pairs than vectors can be listed."""
    sums = Counter({0: 1})
    for d in differences:
        up = Counter({s + d: n for s, n in sums.items()})
        down = Counter({s - d: n for s, n in sums.items()})
        sums = up + down
    observed = abs(sum(differences))
    return sum(n for s, n in sums.items() if abs(s) >= observed) / 2 ** len(differences)


@pytest.mark.parametrize("size", [17, 24, 40])
def test_drawn_sign_flips_are_near_the_exact_ones(size: int):
    counts = np.random.default_rng(size).integers(-9, 13, size=size)
    counts[counts == 0] = 1
    p, true = st.sign_flip_p(counts), exact(counts.tolist())
    assert 0.001 < true < 0.9
    assert p == pytest.approx(true, abs=4 * math.sqrt(true * (1 - true) / 100_000))
    assert p != true  # so it was drawn
    assert p == st.sign_flip_p(counts[::-1]) == st.sign_flip_p(-counts)
    assert p == st.sign_flip_p([(100 + d) / 360 - 100 / 360 for d in counts.tolist()])


def test_zeros_do_not_change_p_nor_make_it_drawn():
    assert st.sign_flip_p(MAIZE + [0] * 10) == 1726 / 32768


def test_differences_that_are_rounding_alone_are_zeros():
    noise = [(0.1 + 0.2) - 0.3] * 8
    assert noise[0] > 0
    assert st.sign_flip_p(noise) == 1.0
    assert st.sign_flip_p([1e-6] * 8) == 2 / 256


def test_results_depend_on_no_order_and_no_call_before():
    rng = np.random.default_rng(6)
    values = rng.normal(0.1, 1, 30)
    first = st.paired(values)
    for _ in range(3):
        assert st.paired(rng.permutation(values)) == first
    assert st.paired(values.tolist()) == first


# Several comparisons, and claims.


def test_holm_adjusts_by_hand():
    # sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1: 0.02, 0.03, 0.06, and 0.04 is raised to 0.06
    assert st.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert st.holm([0.5, 0.6]) == [1.0, 1.0]
    assert st.holm([0.02]) == [0.02]
    assert st.holm([]) == []
    assert st.holm([0.01, None, 0.02]) == [pytest.approx(0.03), None, pytest.approx(0.04)]  # None counts in m


def test_holm_rejects_what_the_step_down_procedure_rejects():
    rng = np.random.default_rng(7)
    for _ in range(50):
        p = np.round(rng.uniform(0, 0.2, rng.integers(1, 8)), 2).tolist()
        adjusted = st.holm(p)
        for alpha in rng.uniform(0, 1, 20):
            rejected = set()
            for rank, place in enumerate(np.argsort(p, kind="stable").tolist()):
                if p[place] > alpha / (len(p) - rank):
                    break
                rejected.add(place)
            assert {place for place, q in enumerate(adjusted) if q <= alpha} == rejected


@pytest.mark.parametrize(("pairs", "comparisons"), [(1, 1), (5, 1), (6, 1), (8, 7), (9, 7), (16, 3)])
def test_the_smallest_p_is_reached_where_all_pairs_agree(pairs: int, comparisons: int):
    p = st.sign_flip_p(np.arange(1, pairs + 1))
    least = st.smallest_p(pairs, comparisons)
    assert least == min(1, 2 * comparisons / 2**pairs)
    assert st.holm([p] + [1.0] * (comparisons - 1))[0] == least


def test_drawn_p_is_never_below_the_smallest():
    for pairs in (17, 18, 60):
        assert st.sign_flip_p(np.arange(1, pairs + 1)) >= st.smallest_p(pairs)
    assert st.sign_flip_p(np.arange(1, 61)) == st.smallest_p(60) < st.smallest_p(16)
    assert st.smallest_p(60, 3) == pytest.approx(3 / 100_001)
    assert st.smallest_p(0) == 1.0


def test_the_fewest_pairs_that_can_show_a_difference():
    assert [st.fewest_pairs(m) for m in (1, 2, 7, 40)] == [6, 7, 9, 11]
    assert st.fewest_pairs(10_000) is None


def test_nothing_is_claimed_that_so_few_pairs_cannot_show():
    few = st.claim(5, 2, 0.125)
    assert few == st.Claim(
        False,
        "nothing is claimed: 5 pairs and 2 comparisons give no p below 0.12; "
        "7 pairs are the fewest that can show a difference",
    )
    assert not st.claim(8, 7, 0.01).made  # 14 / 256 > 0.05, whatever p it is given
    assert st.claim(9, 7, 0.04) == st.Claim(True, "p = 0.04 with 9 pairs and 7 comparisons is at most 0.05")
    assert not st.claim(9, 7, 0.06).made
    assert "above 0.05" in st.claim(9, 7, 0.06).reason
    assert "1 pair and 1 comparison " in st.claim(1, 1, 1.0).reason
    assert st.claim(0, 1, None) == st.Claim(False, "nothing is claimed: not one pair is complete")
    assert not st.claim(99, 10_000, 0.01).made


# Pairs and units.


def test_a_pair_counts_only_where_both_figures_are_there():
    ours = {(0, 0): 0.5, (0, 1): None, (1, 0): 0.75, (2, 0): 0.25}
    theirs = {(0, 0): 0.25, (0, 1): 0.5, (1, 0): 0.5, (3, 0): 0.25}
    assert st.pair(ours, theirs) == st.Pairs({(0, 0): 0.25, (1, 0): 0.25}, ((0, 1), (2, 0), (3, 0)))
    found = st.compare(ours, theirs)
    assert (found.pairs, found.left_out, found.mean, found.p) == (2, 3, 0.25, 0.5)
    nothing = st.compare({(0, 0): None}, {(0, 0): 0.5})
    assert nothing == st.Paired(None, None, None, None, 0, 1)
    assert st.compare({}, {}) == st.Paired(None, None, None, None, 0, 0)


def test_the_unit_is_the_seed_unless_the_order_is_asked_for():
    differences = {(0, 0): 0.25, (0, 1): 0.75, (1, 0): 1.0, (1, 1): 0.0, (2, 0): -1.0}
    assert st.average_by_unit(differences) == {0: 0.5, 1: 0.5, 2: -1.0}
    assert st.average_by_unit(differences, unit="order") == {0: pytest.approx(0.25 / 3), 1: 0.375}
    ours = dict.fromkeys(differences, 0.0) | differences
    theirs = dict.fromkeys(differences, 0.0)
    assert st.compare(ours, theirs) == st.paired([0.5, 0.5, -1.0])
    assert st.compare(ours, theirs, unit="order").pairs == 2
    with pytest.raises(UsageError, match="unit='run' is not a unit of a study; take 'seed' or 'order'"):
        st.average_by_unit(differences, unit="run")


# Across scenarios.


def test_the_interquartile_mean_leaves_out_a_quarter_at_each_end():
    found = st.interquartile_mean([[0.0, 0.5, 0.25, 9.0], [0.125, 0.75, -5.0, 0.375]])
    assert (found.value, found.count) == (np.mean([0.125, 0.25, 0.375, 0.5]), 8)
    assert st.interquartile_mean([[1.0, 2.0, 6.0]]).value == 3.0  # a quarter of 3, rounded down, is none
    assert st.interquartile_mean([[1.0], []]) == st.Estimate(1.0, None, 1)
    assert st.interquartile_mean([]) == st.Estimate(None, None, 0)


def test_the_bootstrap_of_the_interquartile_mean_is_stratified():
    # drawn within scenarios, nothing varies; drawn from the pool, the ends would be 0.1 and 0.9
    assert st.interquartile_mean([[0.1] * 4, [0.9] * 4]).interval == pytest.approx((0.5, 0.5))
    rng = np.random.default_rng(8)
    strata = [rng.lognormal(m, 1.5, n) for m, n in ((0.2, 8), (0.5, 6), (0.9, 10))]
    drawn = np.concatenate([s[rng.integers(len(s), size=(50_000, len(s)))] for s in strata], axis=1)
    drawn.sort(axis=1)
    means = drawn[:, 6:-6].mean(1)
    expected = np.quantile(means, [0.025, 0.975])
    found = st.interquartile_mean(strata)
    tolerance = 0.06 * means.std() * 1.96
    assert found.interval == pytest.approx(expected, abs=tolerance)
    mirrored = 2 * found.value - expected[::-1]  # the basic bootstrap's ends are others on such skewed values
    assert min(abs(mirrored - expected)) > 2 * tolerance


def test_probability_of_improvement_counts_all_pairs_of_runs():
    # 0.5 beats 0.4 and ties with 0.5, 0.3 beats none: (1 + 1/2) / 4; on the second scenario all: 4 / 4
    ours, theirs = [[0.5, 0.3], [1.0, 2.0]], [[0.4, 0.5 + 1e-16], [0.0, 0.5]]
    found = st.probability_of_improvement(ours, theirs)
    assert (found.value, found.count) == ((1.5 / 4 + 1) / 2, 2)
    assert st.probability_of_improvement(theirs, ours).value == pytest.approx(1 - found.value)
    assert st.probability_of_improvement([[1.0, 2.0]], [[0.0, 0.5]]).interval == (1.0, 1.0)
    assert st.probability_of_improvement([[1.0], []], [[0.0], [1.0]]) == st.Estimate(1.0, None, 1)
    assert st.probability_of_improvement([[]], [[]]) == st.Estimate(None, None, 0)
    with pytest.raises(UsageError, match="2 and 1 scenarios"):
        st.probability_of_improvement(ours, theirs[:1])


def test_the_interval_of_the_probability_of_improvement_equals_brute_force():
    rng = np.random.default_rng(9)
    ours, theirs = rng.normal(0.5, 1, (2, 6)), rng.normal(0, 1, (2, 5))
    values = []
    for _ in range(1_500):
        shares = []
        for x, y in zip(ours, theirs, strict=True):
            x, y = rng.choice(x, 6), rng.choice(y, 5)
            shares.append(np.mean([a > b for a in x for b in y]))
        values.append(np.mean(shares))
    expected = np.quantile(values, [0.025, 0.975])
    found = st.probability_of_improvement(ours, theirs).interval
    assert found == pytest.approx(expected, abs=0.15 * np.std(values) * 1.96)


def test_average_ranks_of_demsar_s_example():
    found = st.average_ranks(TREES)
    assert [round(rank, 3) for rank in found.average] == [3.143, 2.000, 2.893, 1.964]
    assert (found.scenarios, found.left_out) == (14, 0)
    assert st.critical_difference(4, 14) == pytest.approx(1.25, abs=0.005)
    assert st.critical_difference(4, 14, 0.10) == pytest.approx(1.12, abs=0.005)


def test_a_scenario_counts_for_ranks_only_where_all_methods_are_there():
    assert st.average_ranks([[0.5, 0.5 + 1e-16, 0.25], [1.0, None, 2.0]]) == st.Ranks((1.5, 1.5, 3.0), 1, 1)
    assert st.average_ranks([[None, 1.0]]) == st.Ranks((), 0, 1)
    assert st.average_ranks([]) == st.Ranks((), 0, 0)
    with pytest.raises(DataError, match="scenario 1 has 1 scores, the first one 2"):
        st.average_ranks([[1.0, 2.0], [1.0]])


@pytest.mark.parametrize(
    ("alpha", "table"),
    [
        (0.05, [1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164]),
        (0.10, [1.645, 2.052, 2.291, 2.459, 2.589, 2.693, 2.780, 2.855, 2.920]),
    ],
)
def test_the_critical_difference_has_demsar_s_quantiles(alpha: float, table: list[float]):
    """Demšar, 2006, table 5a, for 2 to 10 methods."""
    for k, q in enumerate(table, 2):
        assert st.critical_difference(k, 20, alpha) / math.sqrt(k * (k + 1) / 120) == pytest.approx(q, abs=1e-3)


def test_there_is_no_critical_difference_below_eight_scenarios():
    assert st.critical_difference(5, 7) is None
    assert st.critical_difference(5, 8) == pytest.approx(2.728 * math.sqrt(30 / 48), abs=1e-3)
    assert st.critical_difference(1, 20) is None


# What is degenerate or refused.


def test_one_pair_has_no_interval_and_equal_ones_have_no_width():
    assert st.paired([0.25]) == st.Paired(0.25, None, None, 1.0, 1)
    assert st.paired([0.0] * 3) == st.Paired(0.0, st.Interval(0.0, 0.0), None, 1.0, 3)
    equal = st.paired([(0.7 - 0.6), (0.2 - 0.1)] * 12)
    assert equal.interval == pytest.approx((0.1, 0.1), abs=1e-15)
    assert equal.interval[1] - equal.interval[0] == 0
    assert equal.bca is None
    assert equal.p == pytest.approx(1 / 100_001)
    assert st.bca_interval([1.0]) is None
    assert st.mean_interval([]) == st.Estimate(None, None, 0)


def test_results_are_json_without_nan():
    for values in ([], [0.5], [0.5] * 30, [0.5] * 29 + [0.25], list(range(30))):
        json.dumps(asdict(st.paired(values)), allow_nan=False)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(bad: float):
    calls = [
        lambda: st.mean_interval([1.0, bad]),
        lambda: st.bca_interval([1.0, bad]),
        lambda: st.sign_flip_p([1.0, bad]),
        lambda: st.paired([1.0, bad]),
        lambda: st.pair({1: bad}, {1: 0.5}),
        lambda: st.pair({1: 0.5}, {1: bad}),
        lambda: st.average_by_unit({(0, 0): bad}),
        lambda: st.interquartile_mean([[1.0], [bad]]),
        lambda: st.probability_of_improvement([[1.0]], [[bad]]),
        lambda: st.average_ranks([[1.0, bad]]),
        lambda: st.holm([0.5, bad]),
    ]
    for call in calls:
        with pytest.raises(DataError, match=f"{bad}"):
            call()


@pytest.mark.parametrize("bad", [0.0, 1.0, 95, math.nan])
def test_levels_beyond_0_and_1_are_refused(bad: float):
    calls = [
        lambda: st.mean_interval([1.0], bad),
        lambda: st.bca_interval([1.0], bad),
        lambda: st.paired([], bad),
        lambda: st.interquartile_mean([], bad),
        lambda: st.probability_of_improvement([], [], bad),
        lambda: st.critical_difference(3, 9, bad),
    ]
    for call in calls:
        with pytest.raises(UsageError, match=f"{bad} is not between 0 and 1"):
            call()


def test_counts_that_cannot_be_are_refused():
    for pairs, comparisons in ((-1, 1), (8, 0)):
        with pytest.raises(UsageError, match=f"{pairs} pairs and {comparisons} comparisons"):
            st.smallest_p(pairs, comparisons)
    with pytest.raises(DataError, match=r"p = 1\.5 is not between 0 and 1"):
        st.holm([1.5])


def test_the_package_imports_neither_scipy_nor_torch():
    code = "import sys, clframe.experiments.statistics; print({'scipy', 'torch'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
