"""ScaNN against the exact engine."""

from __future__ import annotations

import numpy as np
import pytest

from kafjax.core.errors import UserError
from kafjax.retrieval import ExactIndex, Index, ScannIndex, load_index

N, D, K = 5_000, 64, 10


def clustered(n: int, seed: int) -> np.ndarray:
    """Unit vectors around 200 centres, the same ones for every seed."""
    centres = np.random.default_rng(0).normal(size=(200, D))
    rng = np.random.default_rng(seed)
    vectors = centres[rng.integers(0, 200, n)] + 0.5 * rng.normal(size=(n, D))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def names(n: int, prefix: str = "p") -> list[str]:
    return [f"{prefix}{i}" for i in range(n)]


def built(index: Index) -> Index:
    index.build(names(N), clustered(N, 1))
    return index


def updated(index: Index) -> Index:
    """An index after adding a fifth and removing a fifth."""
    index.append(names(1_000, "new"), clustered(1_000, 2))
    index.delete([*names(900), *names(100, "new")])
    return index


def agreement(index: Index, oracle: Index, k: int = K, n_queries: int = 300) -> tuple[float, float]:
    """Share of queries with the same first neighbour, and recall@k; the scores of what both found
    must be equal."""
    queries = clustered(n_queries, 3)
    ids, scores = index.search(queries, k)
    true_ids, true_scores = oracle.search(queries, k)
    for row in range(len(queries)):
        true = dict(zip(true_ids[row], true_scores[row], strict=True))
        assert len(set(ids[row])) == k
        np.testing.assert_allclose(
            scores[row],
            [true.get(id, score) for id, score in zip(ids[row], scores[row], strict=True)],
            atol=1e-6,
        )
    first = np.mean([a[0] == b[0] for a, b in zip(ids, true_ids, strict=True)])
    recall = np.mean([len(set(a) & set(b)) / k for a, b in zip(ids, true_ids, strict=True)])
    return float(first), float(recall)


@pytest.fixture(scope="module")
def oracle() -> Index:
    return built(ExactIndex())


@pytest.fixture(scope="module")
def updated_oracle() -> Index:
    return updated(built(ExactIndex()))


@pytest.fixture(scope="module")
def tree() -> Index:
    return built(ScannIndex(tree_from=1_000))


def test_exhaustive_search_is_exact_also_after_updates(oracle, updated_oracle):
    index = built(ScannIndex())
    assert agreement(index, oracle) == (1.0, 1.0)
    assert agreement(updated(index), updated_oracle) == (1.0, 1.0)


def test_tree_finds_nearly_all(tree, oracle):
    first, recall = agreement(tree, oracle)
    assert first >= 0.99
    assert recall >= 0.99


def test_updated_tree_finds_nearly_all(updated_oracle, tmp_path):
    index = updated(built(ScannIndex(tree_from=1_000)))
    first, recall = agreement(index, updated_oracle)
    assert first >= 0.98
    assert recall >= 0.98
    index.save(tmp_path / "a")
    assert agreement(load_index(tmp_path / "a"), updated_oracle) == (first, recall)


def test_a_tenth_appended_costs_no_recall_beside_a_tree_built_anew():
    """Vectors without clusters are the hard case: a tree of them finds fewer however it was made,
    and appended ones fit its leaves least."""
    rng = np.random.default_rng(0)
    drawn = rng.normal(size=(4_700, D)).astype(np.float32)
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    vectors, queries, n = drawn[:4_400], drawn[4_400:], 4_000
    ids = names(len(vectors))
    grown, anew, exact = ScannIndex(tree_from=1_000), ScannIndex(tree_from=1_000), ExactIndex()
    grown.build(ids[:n], vectors[:n])
    grown.append(ids[n:], vectors[n:])
    for index in (anew, exact):
        index.build(ids, vectors)
    true_ids, _ = exact.search(queries, K)

    def recall(index: Index, among: set[str]) -> float:
        """Share of the true neighbours in `among` that are found."""
        found_ids, _ = index.search(queries, K)
        pairs = [(set(a), set(b) & among) for a, b in zip(found_ids, true_ids, strict=True)]
        return sum(len(a & b) for a, b in pairs) / sum(len(b) for _, b in pairs)

    assert recall(anew, set(ids)) > 0.75
    for among, margin in ((set(ids), 0.04), (set(ids[n:]), 0.08)):
        assert recall(grown, among) >= recall(anew, among) - margin


def test_a_target_for_the_recall_is_reached_for_new_queries_by_as_few_leaves_as_it_takes(oracle):
    queries, leaves = clustered(1_000, 3), []
    for target in (0.7, 0.95, 1.0):
        index = built(ScannIndex(tree_from=1_000, recall=target))
        assert set(index.ids) == set(names(N))
        for setting in index.tuned:
            assert setting.recall >= target
            true_ids, _ = oracle.search(queries, setting.k)
            ids, _ = index.search(queries, setting.k)
            found = [len({*a} & {*b}) / setting.k for a, b in zip(ids, true_ids, strict=True)]
            # of a mean over the queries, and of the one that was measured
            assert np.mean(found) + 4 * np.std(found) / len(found) ** 0.5 >= target
            assert abs(np.mean(found) - setting.recall) <= 6 * np.std(found) / 500**0.5
        leaves.append([setting.leaves for setting in index.tuned])
    assert leaves == sorted(leaves) and leaves[0][0] < leaves[2][0]


def test_settings_of_a_target_are_saved_and_outlast_changes(tmp_path):
    index = updated(built(ScannIndex(tree_from=1_000, recall=0.9)))
    index.save(tmp_path / "a")
    index.append(names(10, "late"), clustered(10, 4))
    index.save(tmp_path / "a")  # a segment beside the base
    loaded = load_index(tmp_path / "a")
    assert isinstance(loaded, ScannIndex) and loaded.stats.n_segments == 2
    assert (loaded.recall, loaded.tuned, loaded.how) == (0.9, index.tuned, index.how)
    queries = clustered(50, 5)
    for k in (1, 10, 11, 100, 101):
        assert loaded.settings(k) == index.settings(k)
        assert loaded.search(queries, k)[0] == index.search(queries, k)[0]
        assert loaded.search(queries[:1], k)[0] == loaded.search(queries, k)[0][:1]
    ten, hundred = index.tuned
    assert [loaded.settings(k)[1] for k in (1, 10, 11, 100)] == [
        *[ten.leaves] * 2,
        *[hundred.leaves] * 2,
    ]
    assert loaded.settings(101) == built(ScannIndex(tree_from=1_000)).settings(101)
    assert f"recall@10 {ten.recall:.3f} in {ten.leaves} of them" in loaded.stats.search


def test_an_exhaustive_index_meets_any_target_and_measures_none():
    index = ScannIndex(recall=0.5)
    index.build(names(100), clustered(100, 1))
    assert index.tuned == () and "every vector" in index.stats.search


@pytest.mark.parametrize("recall", [0.0, -1, 1.01, float("nan")])
def test_no_target_outside_0_to_1(recall):
    with pytest.raises(UserError, match="recall="):
        ScannIndex(recall=recall)


@pytest.mark.parametrize(("k", "enough"), [(60, 0.9), (150, 0.98), (1_000, 0.98), (N, 1.0)])
def test_tree_gives_as_many_as_asked_for(tree, oracle, k, enough):
    """Numbers lie past the default reordering, past the first leaves' contents, and at
    everything."""
    first, recall = agreement(tree, oracle, k, n_queries=30)
    assert first >= 0.95
    assert recall >= enough


def test_a_tree_grown_from_nothing_is_built_once_and_then_appended_to():
    index = ScannIndex(tree_from=1_000)
    for start in range(0, N, 2_500):
        index.append(names(N)[start : start + 2_500], clustered(N, 1)[start : start + 2_500])
    first, recall = agreement(index, built(ExactIndex()))
    assert first >= 0.98
    assert recall >= 0.98


def test_neighbours_beyond_leaves_that_deletes_emptied():
    """Three quarters of the leaves lie around the query, and all but two of their vectors are
    gone."""
    rng = np.random.default_rng(5)
    near = np.eye(1, D) + 0.1 * rng.normal(size=(1_500, D))
    far = -np.eye(1, D) + 0.1 * rng.normal(size=(500, D))
    index = ScannIndex(tree_from=1_000)
    index.build([*names(1_500, "near"), *names(500, "far")], np.concatenate([near, far]))
    index.delete(names(1_500, "near")[2:])
    ids, scores = index.search(np.eye(1, D), 5)
    assert set(ids[0][:2]) == {"near0", "near1"}
    assert len({id for id in ids[0] if id.startswith("far")}) == 3
    assert not np.isnan(scores).any()


@pytest.mark.parametrize("vectors", ["equal", "zero", "one-dimensional"])
def test_degenerate_vectors_train_a_tree(vectors):
    n = 500
    array = {
        "equal": np.ones((n, 8)),
        "zero": np.zeros((n, 8)),
        "one-dimensional": np.linspace(-1, 1, n)[:, None],
    }[vectors]
    index = ScannIndex(tree_from=100)
    index.build(names(n), array)
    ids, scores = index.search(array[:2], n)
    assert [set(row) for row in ids] == [set(names(n))] * 2
    np.testing.assert_allclose(scores, np.sort(array[:2] @ array.T, axis=1)[:, ::-1], atol=1e-6)


def test_bad_vectors_never_reach_scann():
    """Each of these kills the process once ScaNN trains on it."""
    for bad in (np.nan, np.inf, 3e18):
        vectors = clustered(2_000, 4)
        vectors[7] *= np.float32(bad)
        with pytest.raises(UserError, match="id 'p7'"):
            ScannIndex(tree_from=1_000).build(names(2_000), vectors)
