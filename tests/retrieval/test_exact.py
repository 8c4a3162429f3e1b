"""The exact engine against NumPy, and what it promises beyond the other engines: ties, identity
after updates, compiles, memory."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kafjax.retrieval import ExactIndex, exact

pytestmark = pytest.mark.optimised


def names(n: int) -> list[str]:
    return [f"p{i}" for i in range(n)]


def small_integers(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    """Vectors whose dot products are exact in float32, in any order of summation, and full of
    ties."""
    return rng.integers(-2, 3, size=(n, d)).astype(np.float32)


def by_numpy(
    ids: list[str], vectors: np.ndarray, queries: np.ndarray, k: int
) -> tuple[list[list[str]], np.ndarray]:
    scores = queries @ vectors.T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return [[ids[i] for i in row] for row in order], np.take_along_axis(scores, order, axis=1)


def assert_equal(
    found: tuple[list[list[str]], np.ndarray], expected: tuple[list[list[str]], np.ndarray]
) -> None:
    assert found[0] == expected[0]
    np.testing.assert_array_equal(found[1], expected[1])


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 600),
    d=st.sampled_from([1, 5]),
    q=st.integers(1, 9),
    k=st.sampled_from([1, 3, 40]),
    seed=st.integers(0, 99),
)
def test_equals_a_stable_sort(n, d, q, k, seed):
    rng = np.random.default_rng(seed)
    vectors, queries = small_integers(rng, n, d), small_integers(rng, q, d)
    index = ExactIndex()
    index.build(names(n), vectors)
    assert_equal(index.search(queries, k), by_numpy(names(n), vectors, queries, k))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_history_of_updates_equals_a_stable_sort(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    contents: dict[str, np.ndarray] = {}
    index = ExactIndex()
    index.build([], np.zeros((0, 3)))
    fresh = 0
    for _ in range(data.draw(st.integers(1, 6))):
        if contents and data.draw(st.booleans()):
            gone = data.draw(st.lists(st.sampled_from(sorted(contents)), unique=True))
            index.delete(gone)
            for id in gone:
                del contents[id]
        else:
            m = data.draw(st.integers(0, 300))
            ids, vectors = [f"p{fresh + i}" for i in range(m)], small_integers(rng, m, 3)
            index.append(ids, vectors)
            contents.update(zip(ids, vectors, strict=True))
            fresh += m
    queries = small_integers(rng, 4, 3)
    stored = np.array(list(contents.values()), np.float32).reshape(-1, 3)
    assert_equal(
        index.search(queries, 10), by_numpy(list(contents), stored, queries, min(10, len(contents)))
    )


def test_several_chunks_of_rows_and_of_queries():
    n = 2 * exact.CHUNK + 5000
    rng = np.random.default_rng(0)
    vectors, queries = small_integers(rng, n, 4), small_integers(rng, exact.QUERIES + 30, 4)
    index = ExactIndex()
    index.build(names(n), vectors)
    assert_equal(index.search(queries, 12), by_numpy(names(n), vectors, queries, 12))
    k = exact.CHUNK + 100  # more neighbours than a chunk has rows
    assert_equal(index.search(queries[:2], k), by_numpy(names(n), vectors, queries[:2], k))


@pytest.mark.parametrize("n", [200, 700])
def test_updated_equals_fresh_bit_by_bit(n):
    vectors = np.random.default_rng(1).normal(size=(n + 100, 33)).astype(np.float32)
    ids = names(n + 100)
    updated = ExactIndex()
    updated.build(ids[:50], vectors[:50])
    updated.append(ids[50:n], vectors[50:n])
    updated.append(ids[n:], vectors[n:])
    updated.delete(ids[20:n:7])
    kept = [i for i in range(n + 100) if ids[i] in set(updated.ids)]
    fresh = ExactIndex()
    fresh.build([ids[i] for i in kept], vectors[kept])
    queries = np.random.default_rng(2).normal(size=(17, 33)).astype(np.float32)
    assert updated.ids == fresh.ids
    assert_equal(updated.search(queries, 25), fresh.search(queries, 25))


def test_growth_within_the_capacity_compiles_nothing():
    rng = np.random.default_rng(3)
    index = ExactIndex()
    index.build(names(300), rng.normal(size=(300, 6)))
    index.append(["a"], rng.normal(size=(1, 6)))
    index.delete(["a"])
    index.search(rng.normal(size=(2, 6)), 4)
    compiled = [f._cache_size() for f in (exact._top_k, exact._set_rows, exact._take_rows)]
    for m in (1, 2, 5, 100):
        ids = [f"m{m}-{i}" for i in range(m)]
        index.append(ids, rng.normal(size=(m, 6)))
        index.search(rng.normal(size=(2, 6)), 4)
        index.delete(ids[:1])
    assert [f._cache_size() for f in (exact._top_k, exact._set_rows, exact._take_rows)] == compiled


def test_scratch_memory_does_not_grow_with_the_index():
    def scratch_bytes(n: int) -> int:
        vectors, queries = (
            jax.ShapeDtypeStruct((exact.capacity(n), 8), np.float32),
            jax.ShapeDtypeStruct((64, 8), np.float32),
        )
        return (
            exact._top_k.lower(vectors, 1, queries, 10)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    assert scratch_bytes(64 * exact.CHUNK) <= 1.1 * scratch_bytes(4 * exact.CHUNK)


@given(st.integers(0, 10**9))
def test_capacity_is_enough_whole_chunks_and_little_more(n):
    c = exact.capacity(n)
    assert c >= n
    assert c % min(c, exact.CHUNK) == 0
    assert c <= max(256, 2 * n, 1.25 * n + exact.CHUNK if n < 8 * exact.CHUNK else 1.25 * n)


def test_a_mapped_file_searches_as_the_built_index_and_changes_leave_it_alone(tmp_path):
    """More than one chunk of vectors, which no capacity pads."""
    n = exact.CHUNK + 300
    vectors = np.random.default_rng(8).normal(size=(n, 9)).astype(np.float32)
    built = ExactIndex()
    built.build(names(n), vectors)
    built.save(tmp_path / "a")
    (file,) = (tmp_path / "a").glob("segment-*/vectors.npy")
    before = file.read_bytes()
    loaded = ExactIndex.load(tmp_path / "a")
    assert loaded._vectors_CxD.shape == (n, 9)
    queries = np.random.default_rng(9).normal(size=(3, 9)).astype(np.float32)
    assert_equal(loaded.search(queries, 40), built.search(queries, 40))
    for index in (built, loaded):
        index.append(["new"], queries[:1] * 9)
        index.delete(["p5"])
    assert_equal(loaded.search(queries, 40), built.search(queries, 40))
    assert file.read_bytes() == before
