"""The mesh engine: eight devices find what one finds, and what the exact engine finds; smaller
numbers nearly so."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from kafjax.core.errors import UserError
from kafjax.retrieval import ExactIndex, MeshIndex, load_index
from kafjax.retrieval.mesh_index import (
    DTYPES,
    RECALL,
    capacity,
    check_memory,
    planned_bytes,
    quantised,
)
from tests import tiny
from tests.devices import on_eight_devices
from tests.retrieval.eight_devices import embedded, found


@pytest.mark.multiprocess
def test_eight_devices_find_what_one_finds_and_embed_as_one_does(tmp_path):
    bert = tiny.write_bert(tmp_path / "bert")
    *ids, vectors = map(
        json.loads, on_eight_devices(Path(__file__).parent / "eight_devices.py", bert)
    )
    assert ids == [found(name)[0] for name in DTYPES]
    np.testing.assert_allclose(vectors, embedded(str(bert)), atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "recall"), [("float32", 1.0), ("bfloat16", 0.98), ("int8", 0.95)]
)
def test_recall_at_10_of_stored_types(dtype, recall, tmp_path):
    rng = np.random.default_rng(1)
    vectors, queries = rng.normal(size=(3000, 64)), rng.normal(size=(200, 64))
    names = [f"p{i}" for i in range(3000)]
    index, oracle = MeshIndex(dtype), ExactIndex()
    index.build(names[:2800], vectors[:2800])
    index.save(tmp_path / "i")
    index.append(names[2800:], vectors[2800:])
    index.save(tmp_path / "i")
    oracle.build(names, vectors)
    (ids, scores), (true, true_scores) = index.search(queries, 10), oracle.search(queries, 10)
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(ids, true, strict=True)]) >= recall
    np.testing.assert_allclose(scores, true_scores, rtol=1e-5 if dtype == "float32" else 0.03)
    loaded = load_index(tmp_path / "i")
    assert isinstance(loaded, MeshIndex) and loaded.dtype == dtype and loaded.stats.n_segments == 2
    assert loaded.search(queries, 10)[0] == ids


def test_quantising_again_changes_nothing():
    vectors = np.random.default_rng(2).normal(size=(500, 33)).astype(np.float32)
    stored, scales = quantised(vectors, "int8")
    again, _ = quantised(stored.astype(np.float32) * scales[:, None], "int8")
    assert (
        np.array_equal(stored, again)
        and not np.isnan(quantised(np.zeros((2, 3), np.float32), "int8")[0]).any()
    )


def test_memory_is_planned_before_anything_is_loaded():
    assert 1.0e9 <= planned_bytes(21_000_000, 768, "int8", 16) <= 1.05e9
    small: Any = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 0.5e9})
    with pytest.raises(
        UserError,
        match=r"21000000 vectors of 768 numbers in int8 need 1\.0 GB a device on 16, which have 0\.5 GB",
    ):
        check_memory(21_000_000, 768, "int8", small, 16)
    assert all(
        n <= capacity(n, 8) <= max(2048, 1.04 * n + 2048) for n in (1, 2048, 2049, 10**5, 10**7)
    )


def test_memory_is_told_before_anything_is_loaded(tmp_path, capsys):
    index = MeshIndex("int8")
    index.build(["a", "b"], np.eye(2, 8))
    index.save(tmp_path / "i")
    for path in (tmp_path / "i").glob("segment-*/vectors.npy"):
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UserError, match="is damaged"):
        load_index(tmp_path / "i")
    assert (
        "search: 2 vectors of 8 numbers in int8 need 0.0 GB a device on 1"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(("shards", "k"), [(1, 10), (8, 10), (8, 100)])
def test_recall_of_the_bins_that_a_tpu_would_take_is_the_formulas(shards, k):
    """The selection in NumPy: each of a shard's bins keeps its best, the best of all shards are
    merged exactly (Chern et al. 2022)."""
    rows, n_queries = 1 << 16, 200
    shard = jax.ShapeDtypeStruct((1, rows // shards), np.float32)
    choose = functools.partial(
        jax.lax.approx_max_k,
        k=k,
        recall_target=RECALL,
        reduction_input_size_override=rows,
        aggregate_to_topk=False,
    )
    n_bins = jax.eval_shape(choose, shard)[0].shape[1]
    assert rows // shards > n_bins  # else nothing is left out, and this proves nothing
    rng, shares = np.random.default_rng(0), []
    for _ in range(n_queries):
        scores_SxPxM = rng.normal(size=(shards, rows // shards // n_bins, n_bins))
        best_of_bins = scores_SxPxM.max(axis=1).ravel()
        least = np.partition(scores_SxPxM.ravel(), -k)[-k]
        shares.append((best_of_bins >= least).sum() / k)
    bins, recall, error = shards * n_bins, np.mean(shares), np.std(shares) / n_queries**0.5
    assert recall + 4 * error >= (1 - 1 / bins) ** (k - 1) >= RECALL
    assert abs(recall - bins / k * (1 - (1 - 1 / bins) ** k)) <= 4 * error + k / rows


def test_another_dtype_is_refused():
    with pytest.raises(UserError, match="not 'float8'"):
        MeshIndex("float8")
