"""Statistics of a study: intervals, tests and aggregates over plain numbers, each with formula and source.

The numbers are figures of order 1, such as accuracies, or differences between the figures of two methods on the same
seed and class order (a pair). Their order never matters: the same numbers give the same results to the bit, and
everything that is drawn at random has a fixed seed. What a few pairs cannot show is None or is not claimed, and a
number that is not finite is refused with a `DataError`.

Sources:
- Student, The probable error of a mean, Biometrika 1908.
- Fisher, The Design of Experiments, 1935, section 21 (all sign vectors of paired differences).
- Phipson & Smyth, Permutation p-values should never be zero, 2010 (drawn sign vectors).
- Efron, Better bootstrap confidence intervals, JASA 1987; Efron & Tibshirani, An Introduction to the Bootstrap, 1993,
  chapter 14 (BCa).
- Holm, A simple sequentially rejective multiple test procedure, 1979.
- Agarwal et al., Deep reinforcement learning at the edge of the statistical precipice, NeurIPS 2021 (interquartile
  mean, probability of improvement, stratified bootstrap).
- Demšar, Statistical comparisons of classifiers over multiple data sets, JMLR 2006 (average ranks, Nemenyi's test).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from clframe.errors import DataError, UsageError

LEVEL = 0.95  # of intervals
ALPHA = 0.05  # a claim needs an adjusted p of at most this
EXACT_PAIRS = 16  # the most pairs whose sign vectors are all tried
DRAWN = 100_000  # sign vectors beyond that
RESAMPLES = 9_999  # of a bootstrap
BCA_PAIRS = 20  # the fewest pairs with a BCa interval: it covers too little below (benchmarks/interval_coverage.py)
RANKED_SCENARIOS = 8  # the fewest scenarios with a critical difference
SEED = 0  # of all that is drawn
NOISE = 1e-12  # figures of order 1 that differ by less are equal but for rounding

Numbers = NDArray[np.float64]
Unit = Literal["seed", "order"]
Seed = TypeVar("Seed", bound=Hashable)
Order = TypeVar("Order", bound=Hashable)
Key = TypeVar("Key", bound=Hashable)


class Interval(NamedTuple):
    """A confidence interval, both ends included."""

    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """An estimate with its confidence interval.

    `value` is None without numbers, `interval` is None where there are too few. `count` is the number of values, or of
    scenarios where two methods are compared on each.
    """

    value: float | None
    interval: Interval | None
    count: int


@dataclass(frozen=True)
class Paired:
    """What the differences between two methods show.

    Attributes:
        mean: the mean difference; None without pairs.
        interval: Student's interval of the mean; None below two pairs.
        bca: the BCa bootstrap interval of the mean; None below `BCA_PAIRS` pairs, or if all differences are equal.
        p: two-sided p of the sign-flip test, not adjusted for other comparisons; None without pairs.
        pairs: the number of differences.
        left_out: the number of cells whose partner is missing, and which count nowhere else.
    """

    mean: float | None
    interval: Interval | None
    bca: Interval | None
    p: float | None
    pairs: int
    left_out: int = 0


@dataclass(frozen=True)
class Pairs:
    """Differences by key, and the keys that were left out because the figure of one method is missing."""

    differences: dict[Any, float]
    left_out: tuple[Any, ...]


@dataclass(frozen=True)
class Claim:
    """Whether a difference may be called one, with the sentence that says why."""

    made: bool
    reason: str


@dataclass(frozen=True)
class Ranks:
    """Average ranks of methods, 1 for the best; `left_out` scenarios lack the figure of a method."""

    average: tuple[float, ...]
    scenarios: int
    left_out: int


# Pairs.


def pair(ours: Mapping[Key, float | None], theirs: Mapping[Key, float | None]) -> Pairs:
    """Return the differences `ours` - `theirs` where both figures are there, and the keys of all other cells.

    Args:
        ours: the figures of one method by cell, such as (seed, order); None for a cell without a figure.
        theirs: the figures of the other method, with the same keys. An absent key is a missing figure, too.

    Raises:
        DataError: a figure is not finite.
    """
    differences: dict[Any, float] = {}
    left_out = []
    for key in dict.fromkeys([*ours, *theirs]):
        our, their = ours.get(key), theirs.get(key)
        if our is None or their is None:
            left_out.append(key)
        else:
            differences[key] = _finite(our, f"the figure of {key}") - _finite(their, f"the figure of {key}")
    return Pairs(differences, tuple(left_out))


def average_by_unit(differences: Mapping[tuple[Seed, Order], float], unit: Unit = "seed") -> dict[Any, float]:
    """Return one difference per seed, its mean over the class orders that are there; `unit="order"` is the reverse.

    Runs that share a seed or a class order are not independent. The tests count units, so that further orders make a
    seed's difference more exact but are not further evidence. A unit without any difference does not appear.

    Args:
        differences: by (seed, order).
        unit: what the tests count, "seed" or "order".

    Raises:
        UsageError: there is no such unit.
        DataError: a difference is not finite.
    """
    if unit not in ("seed", "order"):
        raise UsageError(f"unit={unit!r} is not a unit of a study; take 'seed' or 'order'")
    grouped: dict[Any, list[float]] = {}
    for (seed, order), difference in differences.items():
        grouped.setdefault(seed if unit == "seed" else order, []).append(difference)
    return {key: _mean(_numbers(values, f"differences of {unit} {key}")) for key, values in grouped.items()}


def compare(
    ours: Mapping[tuple[Seed, Order], float | None],
    theirs: Mapping[tuple[Seed, Order], float | None],
    unit: Unit = "seed",
    level: float = LEVEL,
) -> Paired:
    """Return what the figures of two methods show: pairs of cells, averaged by unit, then `paired`.

    Args:
        ours: the figures of one method by (seed, order); None for a cell without a figure.
        theirs: the figures of the method that it is compared with.
        unit: what the tests count, "seed" or "order".
        level: of the intervals.

    Raises:
        UsageError: there is no such unit, or `level` is not between 0 and 1.
        DataError: a figure is not finite.
    """
    cells = pair(ours, theirs)
    found = paired(list(average_by_unit(cells.differences, unit).values()), level)
    return replace(found, left_out=len(cells.left_out))


def paired(differences: Sequence[float], level: float = LEVEL) -> Paired:
    """Return the mean of paired differences with its intervals and the p of the sign-flip test.

    Args:
        differences: one per pair, independent of each other.
        level: of the intervals.

    Raises:
        UsageError: `level` is not between 0 and 1.
        DataError: a difference is not finite.
    """
    mean = mean_interval(differences, level)
    bca = bca_interval(differences, level) if mean.count >= BCA_PAIRS else None
    return Paired(mean.value, mean.interval, bca, sign_flip_p(differences), mean.count)


# Intervals of a mean.


def mean_interval(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """Return the mean m of n values with Student's interval, m ± t s / √n.

    s² = Σ (x - m)² / (n - 1), and t is the (1 + level) / 2 quantile of Student's distribution with n - 1 degrees of
    freedom. One value has no interval; that of equal values has no width. (Student, 1908)

    Raises:
        UsageError: `level` is not between 0 and 1.
        DataError: a value is not finite.
    """
    from scipy.special import stdtrit

    _check_level(level)
    x = _numbers(values, "values")
    n = len(x)
    if n == 0:
        return Estimate(None, None, 0)
    m = _mean(x)
    if n == 1:
        return Estimate(m, None, 1)
    s = math.sqrt(math.fsum((x - m) ** 2) / (n - 1))
    half = float(stdtrit(n - 1, (1 + level) / 2)) * s / math.sqrt(n)
    return Estimate(m, Interval(m - half, m + half), n)


def bca_interval(
    values: Sequence[float], level: float = LEVEL, statistic: Callable[..., Any] = np.mean, resamples: int = RESAMPLES
) -> Interval | None:
    """Return the bias-corrected and accelerated bootstrap interval of a statistic, the mean unless named.

    Its ends are the quantiles Φ(z0 + (z0 ± z) / (1 - a (z0 ± z))) of the bootstrap distribution, with z the
    (1 + level) / 2 quantile of the normal distribution, z0 the bias correction and a the acceleration, from the
    jackknife (Efron & Tibshirani, 1993, equations 14.9 to 14.15). It is not defined, and None, for fewer than two
    values or for equal ones.

    Args:
        values: n numbers.
        level: of the interval.
        statistic: a function of an array that takes `axis`, such as `numpy.var`.
        resamples: number of bootstrap samples, drawn with a fixed seed.

    Raises:
        UsageError: `level` is not between 0 and 1.
        DataError: a value is not finite.
    """
    from scipy.stats import bootstrap

    _check_level(level)
    x = _numbers(values, "values")
    if len(x) < 2 or _all_equal(x):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # degenerate bootstrap distributions, which give NaN
        found = bootstrap(
            (x,),
            statistic,
            vectorized=True,
            n_resamples=resamples,
            confidence_level=level,
            method="BCa",
            rng=np.random.default_rng(SEED),
        ).confidence_interval
    interval = Interval(float(found.low), float(found.high))
    return interval if all(map(math.isfinite, interval)) else None


# Tests and claims.


def sign_flip_p(differences: Sequence[float]) -> float | None:
    """Return the two-sided p of the hypothesis that each difference is as likely to have either sign.

    p is the share of the 2^n sign vectors e with abs(Σ e d) >= abs(Σ d) (Fisher, 1935). Sums that differ by rounding
    alone, at most `NOISE` times the larger of 1 and Σ abs(d), are ties and count. A difference of zero adds the same
    to all sums, so that zeros are left out without changing p. From `EXACT_PAIRS` + 1 other differences on, `DRAWN`
    sign vectors are drawn with a fixed seed, and p = (1 + count) / (1 + `DRAWN`) (Phipson & Smyth, 2010). p is None
    without differences.

    Raises:
        DataError: a difference is not finite.
    """
    d = _numbers(differences, "differences")
    if not len(d):
        return None
    observed = abs(math.fsum(d))
    # the sums over all sign vectors depend on absolute values alone; sorted, they come in one order for all inputs
    d = np.sort(np.abs(d))
    tolerance = NOISE * max(1.0, math.fsum(d))
    d = d[d > NOISE]
    if len(d) <= EXACT_PAIRS:
        sums = np.zeros(1)
        for difference in d:
            sums = np.concatenate([sums + difference, sums - difference])
        return float(np.mean(np.abs(sums) >= observed - tolerance))
    rng = np.random.default_rng(SEED)
    count = 0
    for _ in range(0, DRAWN, 10_000):  # in parts, to bound the memory of many pairs
        signs = rng.integers(0, 2, (10_000, len(d)), dtype=np.int8) * 2.0 - 1.0
        count += int(np.sum(np.abs(signs @ d) >= observed - tolerance))
    return (1 + count) / (1 + DRAWN)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return p values adjusted for the number of comparisons, in the order given.

    With the m values sorted, the adjusted i-th is max over j <= i of min(1, (m - j + 1) p_j), which controls the
    probability of any wrong claim (Holm, 1979). A comparison without pairs (None) stays None but counts in m: methods
    whose cells failed do not make the others look better.

    Raises:
        DataError: a p is not between 0 and 1.
    """
    for p in p_values:
        if p is not None and not 0 <= p <= 1:
            raise DataError(f"p = {p} is not between 0 and 1")
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, place) in enumerate(known):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p))
        adjusted[place] = highest
    return adjusted


def smallest_p(pairs: int, comparisons: int = 1) -> float:
    """Return the least p that the sign-flip test of n pairs can give after Holm over m comparisons: min(1, 2m / 2^n).

    From `EXACT_PAIRS` + 1 pairs on, where sign vectors are drawn, it is m / (1 + `DRAWN`).

    Raises:
        UsageError: there is less than one comparison, or the number of pairs is negative.
    """
    if pairs < 0 or comparisons < 1:
        raise UsageError(f"{pairs} pairs and {comparisons} comparisons cannot be tested; give 0 and 1 at least")
    return min(1.0, comparisons * (2.0 ** (1 - pairs) if pairs <= EXACT_PAIRS else 1 / (1 + DRAWN)))


def fewest_pairs(comparisons: int = 1, alpha: float = ALPHA) -> int | None:
    """Return the least number of pairs whose `smallest_p` is at most `alpha`; None if no number suffices."""
    return next((n for n in range(1, 64) if smallest_p(n, comparisons) <= alpha), None)


def claim(pairs: int, comparisons: int, adjusted_p: float | None) -> Claim:
    """Decide whether a difference is claimed: where so many pairs can show one at all, and p after Holm is low enough.

    Args:
        pairs: the number of pairs of this comparison.
        comparisons: the number of comparisons that Holm's adjustment was made for.
        adjusted_p: p after Holm; None without pairs.
    """
    if adjusted_p is None or pairs == 0:
        return Claim(False, "nothing is claimed: not one pair is complete")
    counted = f"{_count(pairs, 'pair')} and {_count(comparisons, 'comparison')}"
    least = smallest_p(pairs, comparisons)
    if least > ALPHA:
        fewest = fewest_pairs(comparisons)
        needed = "" if fewest is None else f"; {fewest} pairs are the fewest that can show a difference"
        return Claim(False, f"nothing is claimed: {counted} give no p below {least:.2g}{needed}")
    if adjusted_p > ALPHA:
        return Claim(False, f"nothing is claimed: p = {adjusted_p:.2g} with {counted} is above {ALPHA}")
    return Claim(True, f"p = {adjusted_p:.2g} with {counted} is at most {ALPHA}")


# Across scenarios.


def interquartile_mean(scenarios: Sequence[Sequence[float]], level: float = LEVEL) -> Estimate:
    """Return the interquartile mean of the values of all scenarios, with a stratified bootstrap interval.

    The values are pooled and the lowest and the highest quarter (rounded down) left out; the rest is averaged. For
    the interval, values are drawn with replacement within each scenario, and the ends are percentiles of the means
    (Agarwal et al., 2021). There is none where a scenario has one value. Scenarios without values count nowhere.

    Args:
        scenarios: the values of a method on each scenario, one per seed, on a common scale.
        level: of the interval.

    Raises:
        UsageError: `level` is not between 0 and 1.
        DataError: a value is not finite.
    """
    from scipy.stats import trim_mean

    def statistic(*samples: Numbers, axis: int = -1) -> Any:
        return trim_mean(np.concatenate(samples, axis=axis), 0.25, axis=axis)

    strata = [x for place, values in enumerate(scenarios) if len(x := _numbers(values, f"scenario {place}'s values"))]
    return _stratified(strata, statistic, level, sum(map(len, strata)))


def probability_of_improvement(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], level: float = LEVEL
) -> Estimate:
    """Return the probability that a run of one method is better than a run of another, averaged over scenarios.

    On a scenario it is the mean over all n k pairs of runs of S(x, y): 1 if x > y, 1/2 if they are equal, else 0. The
    interval is the stratified bootstrap's (Agarwal et al., 2021), which draws the runs of both methods independently.
    There is none where a method has one run on a scenario. Scenarios that one of them has no run on are left out;
    `count` is the number of the others.

    Args:
        ours: the figures of one method on each scenario, one per run; higher is better.
        theirs: those of the other method, on the same scenarios in the same order.
        level: of the interval.

    Raises:
        UsageError: `level` is not between 0 and 1, or the numbers of scenarios differ.
        DataError: a figure is not finite.
    """
    if len(ours) != len(theirs):
        raise UsageError(f"{len(ours)} and {len(theirs)} scenarios cannot be compared; give both the same scenarios")

    def statistic(*samples: Numbers, axis: int = -1) -> Any:
        means = []
        for x, y in zip(samples[::2], samples[1::2], strict=True):  # [..., n] and [..., k]
            gaps = x[..., :, None] - y[..., None, :]
            better = (1 + np.sign(np.where(np.abs(gaps) <= NOISE, 0.0, gaps))) / 2
            means.append(better.mean(axis=(-2, -1)))
        return np.mean(means, axis=0)

    strata = []
    for place, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        x, y = _numbers(our, f"scenario {place}'s values"), _numbers(their, f"scenario {place}'s values")
        if len(x) and len(y):
            strata += [x, y]
    return _stratified(strata, statistic, level, len(strata) // 2)


def average_ranks(scores: Sequence[Sequence[float | None]]) -> Ranks:
    """Return the average rank of each method over scenarios, 1 for the best.

    Equal scores, which agree to 12 decimals, share the mean of their ranks. (Demšar, 2006)

    Args:
        scores: a row for each scenario, a column for each method; higher is better. A row with None is left out.

    Raises:
        DataError: a score is not finite, or a row has another length than the first.
    """
    from scipy.stats import rankdata

    rows = []
    for place, row in enumerate(scores):
        if len(row) != len(scores[0]):
            raise DataError(f"scenario {place} has {len(row)} scores, the first one {len(scores[0])}")
        if None not in row:
            rows.append([_finite(score, f"a score of scenario {place}") for score in row if score is not None])
    if not rows:
        return Ranks((), 0, len(scores))
    ranks = rankdata(-np.round(np.array(rows), 12), axis=1)
    return Ranks(tuple(ranks.mean(axis=0).tolist()), len(rows), len(scores) - len(rows))


def critical_difference(methods: int, scenarios: int, alpha: float = ALPHA) -> float | None:
    """Return how far two of k average ranks over N scenarios must be apart, by Nemenyi's test: q √(k (k + 1) / (6 N)).

    q is the 1 - alpha quantile of the studentized range of k values with infinite degrees of freedom, over √2
    (Demšar, 2006, table 5). It is None below `RANKED_SCENARIOS` scenarios, where the test can hardly show a difference
    and its approximation is poor, and below two methods.

    Raises:
        UsageError: `alpha` is not between 0 and 1.
    """
    if not 0 < alpha < 1:
        raise UsageError(f"alpha={alpha} is not between 0 and 1")
    if scenarios < RANKED_SCENARIOS or methods < 2:
        return None
    from scipy.stats import studentized_range

    q = float(studentized_range.ppf(1 - alpha, methods, math.inf)) / math.sqrt(2)
    return q * math.sqrt(methods * (methods + 1) / (6 * scenarios))


def _stratified(strata: Sequence[Numbers], statistic: Callable[..., Any], level: float, count: int) -> Estimate:
    """Return a statistic of samples with its percentile interval; each bootstrap sample draws within the samples."""
    from scipy.stats import bootstrap

    _check_level(level)
    if not strata:
        return Estimate(None, None, 0)
    value = float(statistic(*strata))
    if min(map(len, strata)) < 2:
        return Estimate(value, None, count)
    found = bootstrap(
        strata,
        statistic,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=1_000,  # to bound the memory of all pairs of runs
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return Estimate(value, Interval(float(found.low), float(found.high)), count)


def _numbers(values: Iterable[float], what: str) -> Numbers:
    """Return `values` as float64, sorted, so that results do not depend on their order, not even by rounding."""
    return np.sort(np.array([_finite(value, f"one of the {what}") for value in values], dtype=np.float64))


def _finite(value: float, what: str) -> float:
    if not math.isfinite(value):
        raise DataError(f"{what} is {value}, and statistics need finite numbers; find the run that it comes from")
    return float(value)


def _mean(x: Numbers) -> float:
    return math.fsum(x) / len(x)


def _all_equal(x: Numbers) -> bool:
    """Return whether sorted numbers are equal but for rounding."""
    return bool(x[-1] - x[0] <= NOISE * max(1.0, abs(x[0])))


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise UsageError(f"level={level} is not between 0 and 1, such as 0.95")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
