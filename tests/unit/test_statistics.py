"""Statistics against scipy and statsmodels, and by simulation: intervals that cover, tests that keep their promise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import expit
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from tunemap import statistics
from tunemap.statistics import Comparison, Interval

STUDIES = 2000
shares = st.lists(st.booleans(), min_size=2, max_size=40)


def covered(interval: Interval, truth: float) -> bool:
    return interval.low <= truth <= interval.high


# --- one group --------------------------------------------------------------------------------------------


@given(correct=st.integers(0, 50), more=st.integers(1, 50))
def test_wilson_equals_its_closed_form(correct, more):
    n, z = correct + more, stats.norm.ppf(0.975)
    interval = statistics.wilson(correct, n)
    roots = np.roots([n + z * z, -(2 * correct + z * z), correct**2 / n])  # (p - share)² = z² p (1 - p) / n
    assert [interval.low, interval.high] == pytest.approx(sorted(roots.real), abs=1e-9)


def test_wilson_stays_within_a_share():
    """24 wrong answers once had a bound of -1.4e-17."""
    for n in range(1, 2000):
        assert 0 <= statistics.wilson(0, n).low < 1e-12
        assert 1 - 1e-12 < statistics.wilson(n, n).high <= 1


def test_wilson_of_no_examples_is_unknown():
    assert not statistics.wilson(0, 0).is_known


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8).filter(lambda v: np.std(v) > 1e-6))
def test_mean_equals_scipy_t_interval(values):
    interval = statistics.mean(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=1e-9)


def test_mean_of_one_value_has_no_interval():
    assert statistics.mean([3.0]).estimate == 3.0
    assert not statistics.mean([3.0]).is_known
    assert not statistics.mean([3.0]).excludes(100.0)


@given(shares)
def test_accuracy_of_one_seed_is_wilson(answers):
    low, high = proportion_confint(sum(answers), len(answers), method="wilson")
    interval = statistics.accuracy([answers])
    assert (interval.low, interval.high) == pytest.approx((low, high))


@given(shares, st.integers(2, 5))
def test_accuracy_of_identical_seeds_is_no_surer_than_one_seed(answers, seeds):
    one, many = statistics.accuracy([answers]), statistics.accuracy([answers] * seeds)
    assert many.high - many.low >= (one.high - one.low) * 0.999 or sum(answers) in (0, len(answers))
    assert many.low + 1e-12 >= 0
    assert many.low - 1e-12 <= many.estimate <= many.high + 1e-12 <= 1 + 1e-11


def test_accuracy_widens_with_disagreement_between_seeds():
    rng = np.random.default_rng(0)
    alike = rng.random((3, 200)) < 0.7
    unlike = rng.random((3, 200)) < np.array([[0.5], [0.7], [0.9]])
    width = [i.high - i.low for i in map(statistics.accuracy, (alike, unlike))]
    assert width[1] > 3 * width[0]


# --- two groups -------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_mcnemar_is_the_binomial_test_of_discordant_pairs(pairs):
    first, second = zip(*pairs, strict=True)
    gained, lost = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    expected = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert statistics.mcnemar(first, second) == pytest.approx(expected)


def test_paired_bootstrap_agrees_with_scipy():
    rng = np.random.default_rng(3)
    first, second = rng.random((2, 150)) < np.array([[0.8], [0.7]])
    ours = statistics.paired_bootstrap([first], [second], resamples=20_000)
    reference = stats.bootstrap(
        (first.astype(float), second.astype(float)),
        lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        rng=0,
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((reference.low, reference.high), abs=0.008)
    assert ours.estimate == pytest.approx(first.mean() - second.mean())


@given(st.integers(1, 3), st.integers(1, 3), st.integers(2, 20), st.integers(0, 1000))
def test_accuracy_difference_is_antisymmetric_and_bounded(seeds, others, examples, seed):
    rng = np.random.default_rng(seed)
    first, second = rng.random((seeds, examples)) < 0.6, rng.random((others, examples)) < 0.4
    one, other = statistics.accuracy_difference(first, second), statistics.accuracy_difference(second, first)
    assert one.effect.estimate == pytest.approx(-other.effect.estimate)
    assert one.effect.low == pytest.approx(-other.effect.high)
    assert one.p_value == pytest.approx(other.p_value)
    assert -1 <= one.effect.low <= one.effect.high <= 1


def test_accuracy_difference_of_unanimous_examples_keeps_a_width():
    comparison = statistics.accuracy_difference(np.ones((1, 60)), np.zeros((1, 60)))
    assert comparison.effect.low < 0.97
    assert comparison.effect.low > 0.8
    assert comparison.effect.estimate == 1.0
    assert comparison.p_value < 1e-15


def test_pairing_examples_is_sharper_than_not_pairing():
    difficulty = np.random.default_rng(1).normal(0, 4, 300)
    rng = np.random.default_rng(2)
    first, second = (rng.random((1, 300)) < expit(shift - difficulty) for shift in (0.6, 0.0))
    paired = statistics.accuracy_difference(first, second).effect
    unpaired = np.hypot(*(i.high - i.low for i in map(statistics.accuracy, (first, second))))
    assert paired.high - paired.low < 0.7 * unpaired


def test_correctness_of_different_examples_is_refused():
    with pytest.raises(ValueError, match="10 and 12 examples"):
        statistics.accuracy_difference(np.ones((1, 10)), np.ones((1, 12)))


def test_ratio_is_welch_on_logs():
    above, below = np.array([120.0, 126.0, 131.0]), np.array([100.0, 99.0, 108.0, 101.0])
    comparison = statistics.ratio(above, below)
    variances = [np.log(side).var(ddof=1) / len(side) for side in (above, below)]
    freedom = sum(variances) ** 2 / sum(v**2 / (len(s) - 1) for v, s in zip(variances, (above, below), strict=True))
    half = stats.t.ppf(0.975, freedom) * np.sqrt(sum(variances))
    centre = np.log(above).mean() - np.log(below).mean()
    assert [comparison.effect.low, comparison.effect.high] == pytest.approx(np.exp([centre - half, centre + half]))
    inverse = statistics.ratio(below, above)
    assert inverse.effect.low == pytest.approx(1 / comparison.effect.high)
    assert inverse.p_value == pytest.approx(comparison.p_value)


def test_ratio_of_one_run_has_no_interval_and_decides_nothing():
    comparison = statistics.ratio([200.0], [100.0, 101.0])
    assert comparison.effect.estimate == pytest.approx(1.99, abs=0.01)
    assert not comparison.effect.is_known
    assert statistics.is_distinguishable(comparison, 0.0, 1.0) is None


def test_ratio_of_counted_bytes_is_exact():
    comparison = statistics.ratio([62, 62], [100, 100])
    assert (comparison.effect.low, comparison.effect.high) == pytest.approx((0.62, 0.62))
    assert comparison.p_value == 0.0
    assert statistics.ratio([5, 5], [5, 5]).p_value == 1.0


def test_ratio_of_a_zero_is_refused():
    with pytest.raises(ValueError, match="positive"):
        statistics.ratio([0.0, 1.0], [1.0, 2.0])


# --- many comparisons -------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0, 1) | st.just(float("nan")), max_size=12))
def test_holm_equals_statsmodels_and_keeps_gaps(p_values):
    adjusted, tested = statistics.holm(p_values), np.isfinite(np.array(p_values, dtype=float))
    assert np.isnan(adjusted[~tested]).all()
    if tested.any():
        assert adjusted[tested] == pytest.approx(multipletests(np.array(p_values)[tested], method="holm")[1])


@pytest.mark.parametrize(
    ("low", "high", "p_value", "expected"),
    [
        (0.01, 0.1, 0.01, True),
        (-0.01, 0.1, 0.01, False),
        (0.01, 0.1, 0.06, False),
        (float("nan"), float("nan"), 0.01, None),
    ],
)
def test_distinguishable_needs_both_interval_and_test(low, high, p_value, expected):
    comparison = Comparison(Interval(0.05, low, high), p_value)
    assert statistics.is_distinguishable(comparison, p_value, 0.0) is expected


# --- trade-offs -------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12))
def test_pareto_front_equals_brute_force(points):
    expected = [not any(all(b >= a for a, b in zip(p, q, strict=True)) and q != p for q in points) for p in points]
    assert statistics.pareto_front(points).tolist() == expected


def test_front_probability_of_certain_points_is_the_front():
    points = [[Interval(v, v, v) for v in point] for point in ((1, 5), (2, 4), (1, 4))]
    assert statistics.front_probability(points).tolist() == [1.0, 1.0, 0.0]


def test_front_probability_of_overlapping_points_is_undecided():
    wide = [[Interval(1.0, 0.5, 1.5), Interval(1, 1, 1)], [Interval(1.02, 0.52, 1.52), Interval(1, 1, 1)]]
    assert all(0.4 < p < 0.6 for p in statistics.front_probability(wide))
    assert statistics.front_probability([]).size == 0


# --- simulated studies ------------------------------------------------------------------------------------


def test_wilson_covers():
    rng = np.random.default_rng(10)
    truth = rng.uniform(0.05, 0.95, STUDIES)
    hits = [covered(statistics.wilson(c, 300), t) for c, t in zip(rng.binomial(300, truth), truth, strict=True)]
    assert 0.93 <= np.mean(hits) <= 0.97


def test_mean_over_three_seeds_covers():
    values = np.random.default_rng(11).normal(5.0, 2.0, (STUDIES, 3))
    assert 0.93 <= np.mean([covered(statistics.mean(row), 5.0) for row in values]) <= 0.97


@pytest.mark.parametrize(("seeds", "spread"), [((3, 3), (0.02, 0.02)), ((5, 3), (0.01, 0.05)), ((4, 4), (0.05, 0.01))])
def test_throughput_ratio_covers(seeds, spread):
    rng = np.random.default_rng(12)
    above = 1.3 * np.exp(rng.normal(0, spread[0], (STUDIES, seeds[0])))
    below = np.exp(rng.normal(0, spread[1], (STUDIES, seeds[1])))
    hits = [covered(statistics.ratio(a, b).effect, 1.3) for a, b in zip(above, below, strict=True)]
    assert 0.93 <= np.mean(hits) <= 0.97


def simulated(rng, seeds, level, difficulty, seed_spread):
    """Correctness [seeds, examples] of a method whose skill varies by seed on examples that vary in difficulty."""
    skill = level + rng.normal(0, seed_spread, (seeds, 1))
    return rng.random((seeds, difficulty.size)) < expit(skill - difficulty)


def expected_accuracy(level, seed_spread, example_spread):
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    return float((weights * expit(level + nodes * np.hypot(seed_spread, example_spread))).sum() / weights.sum())


@pytest.mark.parametrize("seed_spread", [0.1, 0.4])
def test_accuracy_covers_new_examples_and_new_seeds(seed_spread):
    rng, truth = np.random.default_rng(13), expected_accuracy(0.8, seed_spread, 1.5)
    hits = [
        covered(statistics.accuracy(simulated(rng, 5, 0.8, rng.normal(0, 1.5, 300), seed_spread)), truth)
        for _ in range(STUDIES)
    ]
    assert 0.93 <= np.mean(hits) <= 0.97


@pytest.mark.parametrize(("seeds", "seed_spread"), [(5, 0.4), (10, 0.2)])
def test_accuracy_difference_covers(seeds, seed_spread):
    rng, hits = np.random.default_rng(14), []
    truth = expected_accuracy(1.1, seed_spread, 1.5) - expected_accuracy(0.6, seed_spread, 1.5)
    for _ in range(STUDIES):
        difficulty = rng.normal(0, 1.5, 300)
        sides = [simulated(rng, seeds, level, difficulty, seed_spread) for level in (1.1, 0.6)]
        hits.append(covered(statistics.accuracy_difference(*sides).effect, truth))
    assert 0.93 <= np.mean(hits) <= 0.97


def test_accuracy_difference_of_single_runs_covers():
    rng, hits = np.random.default_rng(15), []
    truth = expected_accuracy(1.1, 0, 1.5) - expected_accuracy(0.6, 0, 1.5)
    for _ in range(STUDIES):
        difficulty = rng.normal(0, 1.5, 300)
        sides = [simulated(rng, 1, level, difficulty, 0) for level in (1.1, 0.6)]
        hits.append(covered(statistics.accuracy_difference(*sides).effect, truth))
    assert 0.93 <= np.mean(hits) <= 0.97


def test_paired_bootstrap_covers():
    rng, hits = np.random.default_rng(16), []
    truth = expected_accuracy(1.1, 0, 1.5) - expected_accuracy(0.6, 0, 1.5)
    for _ in range(STUDIES):
        difficulty = rng.normal(0, 1.5, 300)
        sides = [simulated(rng, 1, level, difficulty, 0) for level in (1.1, 0.6)]
        hits.append(covered(statistics.paired_bootstrap(*sides, resamples=1000), truth))
    assert 0.93 <= np.mean(hits) <= 0.97


@pytest.mark.parametrize("seeds", [1, 3])
def test_few_experiments_call_equal_methods_different(seeds):
    """Family-wise error: five methods equal to the baseline, accuracy and throughput each corrected by Holm."""
    rng, wrong = np.random.default_rng(17), {"accuracy": 0, "throughput": 0}
    for _ in range(STUDIES // 2):
        difficulty = rng.normal(0, 1.5, 200)
        sides = [simulated(rng, seeds, 0.8, difficulty, 0.2 if seeds > 1 else 0) for _ in range(6)]
        speeds = np.exp(rng.normal(0, 0.02, (6, max(seeds, 3))))
        families = {
            "accuracy": ([statistics.accuracy_difference(side, sides[0]) for side in sides[1:]], 0.0),
            "throughput": ([statistics.ratio(speed, speeds[0]) for speed in speeds[1:]], 1.0),
        }
        for name, (family, none) in families.items():
            adjusted = statistics.holm([one.p_value for one in family])
            wrong[name] += any(
                statistics.is_distinguishable(one, p, none) for one, p in zip(family, adjusted, strict=True)
            )
    assert wrong["accuracy"] / (STUDIES // 2) < 0.05
    assert wrong["throughput"] / (STUDIES // 2) < 0.05


def test_real_differences_are_found():
    rng = np.random.default_rng(18)
    difficulty = rng.normal(0, 1.5, 300)
    better, worse = simulated(rng, 3, 2.5, difficulty, 0.1), simulated(rng, 3, 0.5, difficulty, 0.1)
    comparison = statistics.accuracy_difference(better, worse)
    assert statistics.is_distinguishable(comparison, float(statistics.holm([comparison.p_value] * 6)[0]), 0.0)
