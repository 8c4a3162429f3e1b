from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kafjax.evaluation import intervals
from kafjax.evaluation.intervals import Interval


@given(st.integers(1, 500), st.data(), st.sampled_from([0.8, 0.95, 0.99]))
@settings(deadline=None)
def test_wilson_equals_scipy(n, data, confidence):
    k = data.draw(st.integers(0, n))
    reference = stats.binomtest(k, n).proportion_ci(confidence, method="wilson")
    ours = intervals.wilson(k, n, confidence)
    assert (ours.low, ours.high) == pytest.approx((reference.low, reference.high), abs=1e-12)
    assert 0 <= ours.low <= ours.value <= ours.high <= 1


@pytest.mark.parametrize(("p", "n"), [(0.5, 20), (0.9, 48), (0.97, 96), (0.02, 96)])
def test_wilson_covers_the_truth_about_95_percent_of_the_time(p, n):
    successes = np.arange(n + 1)
    covered = [
        intervals.wilson(int(k), n).low <= p <= intervals.wilson(int(k), n).high for k in successes
    ]
    coverage = stats.binom.pmf(successes, n, p)[covered].sum()
    assert 0.92 < coverage < 0.99


def test_no_questions_give_no_value():
    nothing = Interval(None, None, None, 0)
    assert (
        intervals.mean_score([])
        == intervals.perplexity([], [])
        == intervals.paired_difference([], [])
        == nothing
    )


def test_zero_one_scores_get_wilson_and_fractions_a_bootstrap():
    assert intervals.mean_score([True, False, True, True]) == intervals.wilson(3, 4)
    fractional = np.random.default_rng(0).beta(4, 2, 200)
    ours = intervals.mean_score(fractional)
    normal = stats.norm.interval(0.95, fractional.mean(), fractional.std(ddof=1) / np.sqrt(200))
    assert (ours.low, ours.high) == pytest.approx(normal, abs=0.004)
    assert intervals.mean_score(fractional) == ours


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 2 / 3, 1.0]), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_every_mean_lies_in_its_interval_however_few_the_scores(scores):
    interval = intervals.mean_score(scores)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1
    assert interval.n == len(scores)


def test_bootstrap_covers_the_truth():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        interval = intervals.mean_score(rng.beta(5, 1.5, 60))
        covered += interval.low <= 5 / 6.5 <= interval.high
    assert covered >= 88  # 95% of 100 has a standard error of 2.2


@pytest.mark.parametrize("scores", [[0.5, 1.1], [-0.1], [float("nan")], [[0.5]]])
def test_scores_outside_the_unit_interval_are_refused(scores):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        intervals.mean_score(scores)


def test_perplexity_weights_tokens_not_texts():
    interval = intervals.perplexity([np.log(2) * 300, np.log(8) * 100], [300, 100])
    assert interval.value == pytest.approx(2 ** (3 / 4) * 8 ** (1 / 4))
    assert 2 - 1e-9 <= interval.low <= interval.value <= interval.high <= 8 + 1e-9


def test_perplexity_ratio_is_paired_by_text():
    rng = np.random.default_rng(0)
    tokens = rng.integers(50, 200, 30)
    # texts differ far more from one another than before and after do
    base = tokens * rng.uniform(1, 6, 30)
    after = base + tokens * rng.normal(0.1, 0.02, 30)
    ratio = intervals.perplexity_ratio(after, base, tokens)
    assert ratio.low < np.exp(0.1) < ratio.high
    assert ratio.high - ratio.low < 0.05
    assert intervals.perplexity_ratio(base, base, tokens) == Interval(1.0, 1.0, 1.0, 30)


def test_perplexity_of_one_text_has_no_bounds_and_of_a_diverged_model_is_refused():
    assert intervals.perplexity([3.0], [3]) == Interval(pytest.approx(np.e), None, None, 1)
    with pytest.raises(ValueError, match="finite"):
        intervals.perplexity([float("nan")], [3])


def correlated_pair(rng, n, p_both=0.6, p_a=0.2, p_b=0.1):
    """0/1 scores of two arms: both right, only a, only b, or neither. The true difference is p_a -
    p_b."""
    outcome = rng.choice(4, n, p=[p_both, p_a, p_b, 1 - p_both - p_a - p_b])
    return np.isin(outcome, (0, 1)), np.isin(outcome, (0, 2))


@pytest.mark.parametrize("n", [20, 96])
def test_paired_interval_covers_the_truth(n):
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(1000):
        interval = intervals.paired_difference(*correlated_pair(rng, n))
        covered += interval.low <= 0.1 <= interval.high
    assert 0.93 < covered / 1000 < 0.99


def test_pairing_gains_over_independent_arms():
    a, b = correlated_pair(np.random.default_rng(3), 400, p_both=0.5, p_a=0.06, p_b=0.02)
    paired = intervals.paired_difference(a, b)
    independent = 1.96 * np.sqrt(a.var() / 400 + b.var() / 400)
    assert (paired.high - paired.low) / 2 < 0.6 * independent


def test_three_equal_answers_do_not_prove_equality():
    interval = intervals.paired_difference([1, 1, 0], [1, 1, 0])
    assert interval.value == 0
    assert interval.low < -0.3


def test_a_comparison_of_different_questions_is_refused():
    with pytest.raises(ValueError, match="same questions"):
        intervals.paired_difference([1, 0], [1])


def test_holm_by_hand_and_never_below_the_raw_values():
    assert intervals.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert intervals.holm([0.9, 0.8]) == [1.0, 1.0]
    assert intervals.holm([]) == []
