"""How sure a number is: intervals, paired tests, corrections for many comparisons, Pareto fronts with uncertainty.

Everything here is arithmetic on arrays; tests and tables that need torch, files or the plan are elsewhere.
Correctness arrays have the shape [seeds, examples] and hold 0 or 1; all seeds answer the same examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

CONFIDENCE = 0.95
NORMAL_QUANTILE = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
NOT_DISTINGUISHABLE = "not distinguishable"

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval; `low` and `high` are NaN where one value says nothing about its spread."""

    estimate: float
    low: float
    high: float

    @property
    def is_known(self) -> bool:
        """Whether there is an interval at all."""
        return bool(np.isfinite(self.low) and np.isfinite(self.high))

    def excludes(self, value: float) -> bool:
        """Whether `value` lies outside; never true without an interval."""
        return self.is_known and not self.low <= value <= self.high


@dataclass(frozen=True)
class Comparison:
    """A difference or ratio with its interval, and the two-sided p-value of "no difference" (NaN: no test)."""

    effect: Interval
    p_value: float


UNKNOWN = Interval(float("nan"), float("nan"), float("nan"))


# --- one group --------------------------------------------------------------------------------------------


def wilson(correct: float, n: float) -> Interval:
    """Wilson score interval of a share of `n` examples (Wilson 1927, https://doi.org/10.2307/2276774)."""
    if n <= 0:
        return UNKNOWN
    return _score_interval(correct / n, n, NORMAL_QUANTILE)


def mean(values: ArrayLike) -> Interval:
    """Mean with Student's t interval, for one value per seed; a single value has no interval."""
    array = np.asarray(values, dtype=float)
    if array.size == 0:
        return UNKNOWN
    estimate = float(array.mean())
    if array.size == 1:
        return Interval(estimate, float("nan"), float("nan"))
    variance, freedom = _mean_term(array)
    half = _t_quantile(freedom) * variance**0.5
    return Interval(estimate, estimate - half, estimate + half)


def accuracy(correct: ArrayLike) -> Interval:
    """Mean accuracy of a method over its seeds, with an interval for new examples *and* new seeds.

    `correct` is [seeds, examples]. Seeds and examples are crossed random effects: the variance of the grand mean is
    the variance between seeds plus that between examples minus the interaction that both contain (balanced two-way
    analysis of variance), with Satterthwaite's degrees of freedom. The interval is Wilson's at the sample size that
    would have this variance (Franco et al. 2019, https://doi.org/10.1093/jssam/smy019), so that it stays inside
    [0, 1] and keeps a width at 0 % and 100 %. With one seed it is the ordinary Wilson interval: nothing is known
    of other seeds then. In simulations it covers 94–96 % with five seeds; with two seeds that differ much more than
    their examples explain only about 90 %.
    """
    array = _crossed(correct)
    seeds, examples = array.shape
    if array.size == 0:
        return UNKNOWN
    share = float(array.mean())
    if seeds == 1:
        return wilson(float(array.sum()), examples)
    variance, freedom = _combine([_mean_term(array.mean(axis=0))], *_seed_terms(array))
    if share in (0.0, 1.0) or variance <= 0:
        return wilson(share * examples, examples)
    return _score_interval(share, share * (1 - share) / variance, _t_quantile(freedom))


# --- two groups -------------------------------------------------------------------------------------------


def mcnemar(first: ArrayLike, second: ArrayLike) -> float:
    """Exact two-sided p-value of McNemar's test on the same examples (https://doi.org/10.1007/BF02295996)."""
    left, right = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    only_left, only_right = int(np.sum(left & ~right)), int(np.sum(~left & right))
    return min(1.0, 2 * float(special.bdtr(min(only_left, only_right), only_left + only_right, 0.5)))


def paired_bootstrap(first: ArrayLike, second: ArrayLike, resamples: int = 4000, seed: int = 0) -> Interval:
    """Difference in accuracy, `first` − `second`, with a percentile interval over resampled examples.

    Both are [seeds, examples]; an example keeps its answers of both sides. The runs are taken as they are: the
    interval speaks of other examples, not of other seeds. A difference per example has few distinct values, so
    that resampling their counts is the same as resampling examples.
    """
    differences = _crossed(first).mean(axis=0) - _crossed(second).mean(axis=0)
    if differences.size == 0:
        return UNKNOWN
    values, counts = np.unique(differences, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(differences.size, counts / differences.size, size=resamples)
    low, high = np.quantile(drawn @ values / differences.size, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(differences.mean()), float(low), float(high))


def accuracy_difference(first: ArrayLike, second: ArrayLike) -> Comparison:
    """Difference in mean accuracy, `first` − `second`, on the same examples, for new examples and new seeds.

    Both are [seeds, examples]; the numbers of seeds may differ, as between a method and the base model. Examples are
    paired; seeds are not (seed 1 of one method is not like seed 1 of another; where it is, this is conservative).
    The variance is that of `accuracy`, the example part computed from the difference per example with one
    agreement-neutral pair of examples added, which keeps a width where all examples agree (Agresti & Min 2005,
    https://doi.org/10.1002/sim.1781). The p-value is McNemar's exact one where each side has one run, and a t test
    with the same variance otherwise. A side with one seed contributes no variance between seeds. In simulations the
    interval covers 95–97 % with five seeds and more, up to 99 % (too wide) with two or three alike seeds.
    """
    left, right = _crossed(first), _crossed(second)
    if left.shape[1] != right.shape[1]:
        raise ValueError(f"correctness of {left.shape[1]} and {right.shape[1]} examples cannot be paired")
    examples = left.shape[1]
    if examples == 0:
        return Comparison(UNKNOWN, float("nan"))
    differences = left.mean(axis=0) - right.mean(axis=0)
    (seeds_left, shared_left), (seeds_right, shared_right) = _seed_terms(left), _seed_terms(right)
    variance, freedom = _combine([_padded_term(differences)], seeds_left + seeds_right, shared_left + shared_right)
    half = _t_quantile(freedom) * np.sqrt(variance)
    centre = float(differences.sum() / (examples + 2))
    estimate = float(differences.mean())
    effect = Interval(estimate, float(max(-1.0, centre - half)), float(min(1.0, centre + half)))
    if len(left) == len(right) == 1:
        return Comparison(effect, mcnemar(left[0], right[0]))
    return Comparison(effect, _t_test(estimate, variance, freedom))


def ratio(numerator: ArrayLike, denominator: ArrayLike) -> Comparison:
    """Ratio of two positive quantities with one value per run, such as throughputs: geometric means, Welch's t on logs.

    Noise of a machine multiplies: a slow minute slows a run by some percent. On the log scale it adds, the interval
    of a ratio and of its inverse are the same statement, and it cannot reach below zero (a ratio of means with
    Fieller's interval can). Welch's version, because methods need not be equally noisy; unpaired, because runs with
    the same seed share the order of their data, not the state of the machine. One value on a side: no interval.
    """
    above, below = np.asarray(numerator, dtype=float), np.asarray(denominator, dtype=float)
    if above.size == 0 or below.size == 0:
        return Comparison(UNKNOWN, float("nan"))
    if min(above.min(), below.min()) <= 0:
        raise ValueError("a ratio needs positive values")
    above, below = np.log(above), np.log(below)
    estimate = float(np.exp(above.mean() - below.mean()))
    if above.size < 2 or below.size < 2:
        return Comparison(Interval(estimate, float("nan"), float("nan")), float("nan"))
    if np.ptp(above) == np.ptp(below) == 0:  # counted quantities, such as bytes: the same in every run
        return Comparison(Interval(estimate, estimate, estimate), float(above[0] == below[0]))
    variance, freedom = _combine([], [_mean_term(above), _mean_term(below)], [])
    difference, half = float(above.mean() - below.mean()), _t_quantile(freedom) * variance**0.5
    effect = Interval(estimate, float(np.exp(difference - half)), float(np.exp(difference + half)))
    return Comparison(effect, _t_test(difference, variance, freedom))


# --- many comparisons -------------------------------------------------------------------------------------


def holm(p_values: ArrayLike) -> Floats:
    """Holm-adjusted p-values of a family of tests (https://www.jstor.org/stable/4615733); NaN: no test, stays NaN.

    Written out because statsmodels' multipletests takes 50 ms a call; equal to it in the tests.
    """
    values = np.asarray(p_values, dtype=float)
    adjusted = np.full(values.shape, np.nan)
    tested = np.isfinite(values)
    order = np.argsort(values[tested])
    steps = values[tested][order] * np.arange(order.size, 0, -1)
    stepped = np.empty(order.size)
    stepped[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    adjusted[tested] = stepped
    return adjusted


def is_distinguishable(comparison: Comparison, adjusted_p_value: float, no_effect: float) -> bool | None:
    """Whether two points differ: both the Holm-adjusted test and the interval must say so. None: no interval."""
    if not comparison.effect.is_known or not np.isfinite(adjusted_p_value):
        return None
    return comparison.effect.excludes(no_effect) and adjusted_p_value < 1 - CONFIDENCE


# --- trade-offs -------------------------------------------------------------------------------------------


def pareto_front(objectives: ArrayLike) -> NDArray[np.bool_]:
    """Which points no other point beats. `objectives` is [..., points, objectives], larger is better; so is the mask.

    A point is beaten by one that is at least as good in every objective and better in one.
    """
    array = np.asarray(objectives, dtype=float)
    columns = [np.ascontiguousarray(array[..., index]) for index in range(array.shape[-1])]
    on_front = np.ones(array.shape[:-1], dtype=bool)
    for point in range(array.shape[-2]):
        no_worse = np.ones(array.shape[:-1], dtype=bool)
        better = np.zeros(array.shape[:-1], dtype=bool)
        for column in columns:  # objective by objective: reducing a last axis of three is five times slower
            this = column[..., point : point + 1]
            no_worse &= column >= this
            better |= column > this
        on_front[..., point] = ~(no_worse & better).any(axis=-1)
    return on_front


def front_probability(intervals: list[list[Interval]], draws: int = 2000, seed: int = 0) -> Floats:
    """How probable it is that each point is on the Pareto front, given the uncertainty of its objectives.

    `intervals[point][objective]`, larger is better. Each objective is drawn from a normal distribution with the
    interval's width, independently: shared examples would only make the differences between points surer.
    """
    if not intervals:
        return np.zeros(0)
    centre = np.array([[objective.estimate for objective in point] for point in intervals])
    width = np.array([[objective.high - objective.low for objective in point] for point in intervals])
    deviation = width / (2 * NORMAL_QUANTILE)
    noise = np.random.default_rng(seed).standard_normal((draws, *centre.shape))
    return pareto_front(centre + noise * deviation).mean(axis=0)


# --- variance of a crossed design -------------------------------------------------------------------------

Term = tuple[float, float]  # a variance of the mean, and its degrees of freedom


def _crossed(correct: ArrayLike) -> Floats:
    return np.atleast_2d(np.asarray(correct, dtype=float))


def _mean_term(values: Floats) -> Term:
    n = values.size
    return (float(values.var(ddof=1)) / n, n - 1) if n > 1 else (0.0, 1)


def _padded_term(differences: Floats) -> Term:
    """The example term of a difference, with Agresti and Min's half an example in each cell of the 2 × 2 table."""
    n = differences.size + 2
    return float(((differences**2).sum() + 1) / n - (differences.sum() / n) ** 2) / n, max(differences.size - 1, 1)


def _seed_terms(array: Floats) -> tuple[list[Term], list[Term]]:
    """The term between seeds and the interaction that it shares with the example term; none for a single seed."""
    seeds, examples = array.shape
    if seeds == 1 or examples == 1:
        return [], []
    residual = array - array.mean(axis=1, keepdims=True) - array.mean(axis=0) + array.mean()
    freedom = (seeds - 1) * (examples - 1)
    interaction = float((residual**2).sum()) / freedom / array.size
    return [(float(array.mean(axis=1).var(ddof=1)) / seeds, seeds - 1)], [(interaction, freedom)]


def _combine(examples: list[Term], seeds: list[Term], interactions: list[Term]) -> Term:
    """Sum of the terms less the interactions, never less than either source alone; Satterthwaite's freedom."""
    total = sum(variance for variance, _ in [*examples, *seeds]) - sum(variance for variance, _ in interactions)
    variance = max(total, sum(v for v, _ in examples), sum(v for v, _ in seeds))
    squares = sum(v**2 / freedom for v, freedom in [*examples, *seeds, *interactions])
    return variance, (variance**2 / squares if squares > 0 else float("inf"))


def _score_interval(share: float, n: float, quantile: float) -> Interval:
    """Wilson's interval for a sample size that is no whole number and a quantile that is not the normal one's."""
    shrink = 1 / (1 + quantile**2 / n)
    centre = shrink * (share + quantile**2 / (2 * n))
    half = shrink * quantile * float(np.sqrt(share * (1 - share) / n + quantile**2 / (4 * n**2)))
    # A share is no less than 0 and no more than 1, whatever rounding says.
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


def _t_quantile(freedom: float) -> float:
    return float(special.stdtrit(freedom, (1 + CONFIDENCE) / 2))  # stats.t.ppf is a hundred times slower


def _t_test(difference: float, variance: float, freedom: float) -> float:
    """Two-sided p-value."""
    return float(2 * special.stdtr(freedom, -abs(difference) / variance**0.5))
