"""Settings of a tree by its recall, on a search whose recall is known."""

from __future__ import annotations

import numpy as np
import pytest

from kafjax.retrieval.tuning import Search, Setting, exact_neighbours, split_rows, tune

L = 40
VECTORS = np.random.default_rng(0).normal(size=(2_000, 8)).astype(np.float32)
QUERIES = np.random.default_rng(1).normal(size=(100, 8)).astype(np.float32)


def leaves_of(most: int) -> Search:
    """Looks into vectors by chance: leaf i has every 40th from i on, and those past `most` are
    never found."""

    def search(queries, k, reorder, leaves):
        rows = np.flatnonzero(np.arange(len(VECTORS)) % L < min(leaves, most))
        scores, found = exact_neighbours(VECTORS[rows], queries, k)
        return rows[found], scores

    return search


def recall(setting: Setting, most: int) -> float:
    true, _ = exact_neighbours(VECTORS, QUERIES, setting.k)
    _, scores = leaves_of(most)(QUERIES, setting.k, setting.reorder, setting.leaves)
    return float((scores >= true[:, -1:]).mean())


def test_exact_neighbours_are_those_of_a_stable_sort(monkeypatch):
    monkeypatch.setattr("kafjax.retrieval.tuning._CHUNK", 300)  # the last one is not whole
    scores, rows = exact_neighbours(VECTORS[:950], QUERIES, 70)
    want = np.argsort(-QUERIES @ VECTORS[:950].T, axis=1, kind="stable")[:, :70]
    np.testing.assert_array_equal(rows, want)
    np.testing.assert_allclose(scores, np.einsum("qd,qkd->qk", QUERIES, VECTORS[want]), rtol=1e-5)
    few = np.argsort(-QUERIES @ VECTORS[:3].T, axis=1)
    np.testing.assert_array_equal(exact_neighbours(VECTORS[:3], QUERIES, 9)[1], few)


def test_a_setting_has_the_recall_that_it_states_in_about_as_few_leaves_as_can_be():
    """A share of the leaves holds that share of the neighbours."""
    leaves = []
    for target in (0.5, 0.9, 1.0):
        for setting in tune(leaves_of(L), VECTORS, QUERIES, L, target):
            assert setting.recall == pytest.approx(recall(setting, L)) and setting.recall >= target
            assert target * L <= setting.leaves <= min(L, (target + 0.05) * L / 0.9 + 1)
            leaves.append(setting.leaves)
    assert leaves == sorted(leaves)


def test_a_recall_out_of_reach_gives_all_leaves_and_what_they_find():
    for setting in tune(leaves_of(L // 2), VECTORS, QUERIES, L, 0.9):
        assert setting.leaves == L and 0.4 < setting.recall < 0.6
        assert setting.reorder > 4 * setting.k  # tried, in vain


def test_equal_vectors_are_found_whichever_of_them_it_is():
    same = np.repeat(VECTORS[:50], 40, axis=0)

    def other_ones(queries, k, reorder, leaves):
        scores, rows = exact_neighbours(same[::-1], queries, k)
        return len(same) - 1 - rows, scores

    (setting,) = (s for s in tune(other_ones, same, QUERIES, L, 1.0) if s.k == 10)
    assert (setting.leaves, setting.recall) == (1, 1.0)


@pytest.mark.parametrize("n", [10, 1_000, 50_000])
def test_a_split_holds_out_a_tenth_at_most_and_keeps_every_row(n):
    kept, held_out = split_rows(n)
    assert 1 <= len(held_out) <= min(500, n / 10)
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, held_out])), np.arange(n))
