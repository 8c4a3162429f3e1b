"""Measures of what a search found, by hand and beside ranx."""

from __future__ import annotations

import functools
import math

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kafjax.evaluation.score import (
    average_precision,
    ndcg,
    recall,
    recall_at_k,
    reciprocal_rank,
)


def test_measures_of_what_was_found_by_hand():
    found, gold = ["x", "a", "y", "b"], {"a", "b", "c"}
    assert recall_at_k(found, gold) == 1 and reciprocal_rank(found, gold) == 1 / 2
    gain = 1 / math.log2(3) + 1 / math.log2(5)
    assert ndcg(found, gold) == pytest.approx(gain / (1 + 1 / math.log2(3) + 1 / math.log2(4)))
    assert ndcg(found[:1], gold) == 0 and ndcg(["a"], gold) == 1 and ndcg(["b", "c"], gold) == 1
    assert ndcg([], gold) == ndcg(["a"], set()) == 0
    # asked for three, found one
    assert ndcg(["a"], gold, k=3) == 1 / (1 + 1 / math.log2(3) + 1 / math.log2(4))
    assert recall(found, gold) == 2 / 3 and recall([], gold) == recall(found, set()) == 0
    assert average_precision(found, gold) == (1 / 2 + 2 / 4) / 3


K = 7
DOCUMENTS = [f"d{i}" for i in range(12)]
RANKINGS = st.lists(
    st.tuples(
        st.lists(st.sampled_from(DOCUMENTS), unique=True, min_size=1, max_size=K),
        st.sets(st.sampled_from(DOCUMENTS), min_size=1, max_size=10),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=50, deadline=None)
@given(RANKINGS)
def test_measures_equal_those_of_ranx(rankings):
    """Question by question, also where fewer than k are found or more than k are gold."""
    numba.config.DISABLE_JIT = True  # to compile its measures would take a minute
    import ranx

    qrels = ranx.Qrels({f"q{i}": dict.fromkeys(gold, 1) for i, (_, gold) in enumerate(rankings)})
    run = ranx.Run(
        {
            f"q{i}": {document: 1 / rank for rank, document in enumerate(found, 1)}
            for i, (found, _) in enumerate(rankings)
        }
    )
    measures = {
        "ndcg": functools.partial(ndcg, k=K),
        "map": average_precision,
        "mrr": reciprocal_rank,
        "recall": recall,
        "hit_rate": recall_at_k,
    }
    theirs = ranx.evaluate(qrels, run, [f"{name}@{K}" for name in measures], return_mean=False)
    for name, measure in measures.items():
        ours = [measure(found, gold) for found, gold in rankings]
        np.testing.assert_allclose(ours, theirs[f"{name}@{K}"], rtol=0, atol=1e-9, err_msg=name)
