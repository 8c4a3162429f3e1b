"""The mesh engine: eight devices find what one finds, and what the exact engine finds; smaller numbers nearly so."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kafjax.core.errors import UserError
from kafjax.retrieval import ExactIndex, MeshIndex, load_index
from kafjax.retrieval.mesh_index import DTYPES, capacity, check_memory, planned_bytes, quantised
from tests.devices import on_eight_devices
from tests.retrieval.eight_devices import found


@pytest.mark.multiprocess
def test_eight_devices_find_what_one_finds():
    lines = on_eight_devices(Path(__file__).parent / "eight_devices.py")
    assert [json.loads(line) for line in lines] == [found(name)[0] for name in DTYPES]


@pytest.mark.parametrize(("dtype", "recall"), [("float32", 1.0), ("bfloat16", 0.98), ("int8", 0.95)])
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
    assert np.array_equal(stored, again) and not np.isnan(quantised(np.zeros((2, 3), np.float32), "int8")[0]).any()


def test_memory_is_planned_before_anything_is_loaded():
    assert 1.0e9 <= planned_bytes(21_000_000, 768, "int8", 16) <= 1.05e9
    small: Any = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 0.5e9})
    with pytest.raises(UserError, match=r"21000000 vectors of 768 numbers in int8 need 1\.0 GB a device on 16, which have 0\.5 GB"):
        check_memory(21_000_000, 768, "int8", small, 16)
    assert all(n <= capacity(n, 8) <= max(2048, 1.04 * n + 2048) for n in (1, 2048, 2049, 10**5, 10**7))


def test_another_dtype_is_refused():
    with pytest.raises(UserError, match="not 'float8'"):
        MeshIndex("float8")
