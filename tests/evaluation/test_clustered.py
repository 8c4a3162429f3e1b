"""Intervals and tests over clusters, against simulation and against the unclustered ones; retrieval measures by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kafjax.evaluation.clustered import clustered_compare, clustered_difference, clustered_mean
from kafjax.evaluation.intervals import mean_score
from kafjax.evaluation.score import ndcg, recall_at_k, reciprocal_rank


def test_questions_that_stand_or_fall_together_give_wider_intervals():
    subjects = np.repeat(np.arange(20), 5)
    scores = np.repeat(np.arange(20) % 2, 5).astype(float)  # all five of a subject are alike
    clustered, plain = clustered_mean(scores, subjects), mean_score(scores)
    assert clustered.value == plain.value == 0.5 and clustered.n == 100
    assert 1.7 < (clustered.high - clustered.low) / (plain.high - plain.low) < 2.6  # sqrt(5) = 2.2


def test_clusters_of_one_are_the_plain_bootstrap():
    scores = np.random.default_rng(0).uniform(size=40)
    ours, plain = clustered_mean(scores, range(40)), mean_score(scores)
    np.testing.assert_allclose((ours.low, ours.value, ours.high), (plain.low, plain.value, plain.high), atol=0.01)


def test_the_interval_covers_the_mean_as_often_as_it_says():
    rng, covered = np.random.default_rng(1), 0
    for _ in range(60):
        level = rng.uniform(0.2, 0.8, 30)
        scores = (rng.uniform(size=(30, 4)) < level[:, None]).astype(float).ravel()
        interval = clustered_mean(scores, np.repeat(np.arange(30), 4))
        covered += interval.low <= 0.5 <= interval.high
    assert covered >= 51  # 95% of 60 is 57


@pytest.mark.parametrize(
    ("values", "clusters", "expected"),
    [([], [], (None, None, None)), ([1.0, 0.0], ["a", "a"], (0.5, None, None)), ([7, 7], ["a", "b"], (7, 7, 7))],
)
def test_little_data(values, clusters, expected):
    interval = clustered_mean(values, clusters)
    assert (interval.value, interval.low, interval.high) == expected


def test_all_right_is_as_sure_as_the_number_of_subjects():
    ten, two = clustered_mean(np.ones(20), np.repeat(np.arange(10), 2)), clustered_mean(np.ones(20), np.repeat(np.arange(2), 10))
    assert ten.high == two.high == 1 and ten.low > two.low > 0


def test_a_difference_in_one_subject_alone_is_no_difference():
    subjects = np.repeat(np.arange(12), 8)
    a, b = np.ones(96), np.ones(96)
    b[:8] = 0
    one = clustered_compare(a, b, subjects)
    assert one.verdict != "greater" and one.p_value == 1.0 and one.difference.value == pytest.approx(1 / 12)
    b[::2] = 0
    many = clustered_compare(a, b, subjects)
    assert many.verdict == "greater" and many.p_value < 0.01 and clustered_compare(b, a, subjects).verdict == "less"
    assert clustered_compare(a, a, np.arange(96)).verdict == "equivalent"
    same = clustered_difference(a, a, subjects)
    assert same.value == 0 and same.low < 0 < same.high
    with pytest.raises(ValueError, match="3 values for 2 clusters"):
        clustered_mean([1, 2, 3], ["a", "b"])


def test_measures_of_what_was_found_by_hand():
    found, gold = ["x", "a", "y", "b"], {"a", "b", "c"}
    assert recall_at_k(found, gold) == 1 and reciprocal_rank(found, gold) == 1 / 2
    gain = 1 / math.log2(3) + 1 / math.log2(5)
    assert ndcg(found, gold) == pytest.approx(gain / (1 + 1 / math.log2(3) + 1 / math.log2(4)))
    assert ndcg(found[:1], gold) == 0 and ndcg(["a"], gold) == 1 and ndcg(["b", "c"], gold) == 1
    assert ndcg([], gold) == ndcg(["a"], set()) == 0
