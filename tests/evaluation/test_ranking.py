"""Measures of what a search found, by hand."""

from __future__ import annotations

import math

import pytest

from kafjax.evaluation.score import ndcg, recall_at_k, reciprocal_rank


def test_measures_of_what_was_found_by_hand():
    found, gold = ["x", "a", "y", "b"], {"a", "b", "c"}
    assert recall_at_k(found, gold) == 1 and reciprocal_rank(found, gold) == 1 / 2
    gain = 1 / math.log2(3) + 1 / math.log2(5)
    assert ndcg(found, gold) == pytest.approx(gain / (1 + 1 / math.log2(3) + 1 / math.log2(4)))
    assert ndcg(found[:1], gold) == 0 and ndcg(["a"], gold) == 1 and ndcg(["b", "c"], gold) == 1
    assert ndcg([], gold) == ndcg(["a"], set()) == 0
