"""The benchmark of search on few vectors: what it writes adds up, and bad input is told."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.search import clustered, recall
from benchmarks.search_engines import ENGINES
from kafjax.retrieval.tuning import exact_neighbours


@pytest.mark.slow
@pytest.mark.multiprocess
def test_each_engine_is_measured_at_its_recall_and_a_store_is_opened(benchmark, tmp_path):
    sizes = ("--dimension=16", "--queries=50", "--singles=10", "--rounds=2", f"--out={tmp_path}")
    done = benchmark("--count=1000", "--engines=kafjax,kafjax-0.95,scann", *sizes)
    assert done.code == 0, done.err
    (case,) = json.loads((tmp_path / "search.json").read_text())["cases"].values()
    assert list(case["engines"]) == ["kafjax", "kafjax-0.95", "scann"]
    for figures in case["engines"].values():
        assert figures["recall"] >= 0.95
        assert 0 < figures["p50"] <= figures["p99"] and figures["qps"] > 0
        assert figures["bytes"] > 1_000 * 16 * 4 and figures["peak"] > figures["bytes"]
    assert case["engines"]["scann"]["ratio"]["value"] == 1
    assert list(case["layer"]) == ["kafjax", "kafjax-0.95"]
    for ratios in case["layer"].values():
        assert {*ratios} == {"batch", "batch, processor", "single", "single, processor"}
        assert all(0 < ratio["low"] <= ratio["high"] for ratio in ratios.values())
    done = benchmark("--open=2000", *sizes)
    assert done.code == 0, done.err
    cases = json.loads((tmp_path / "search.json").read_text())["cases"]
    assert list(cases) == ["1000", "opened"] and len(cases["opened"]["seconds"]) == 2
    assert (tmp_path / "search.md").read_text() in done.out


def test_vectors_are_of_unit_length_and_recall_counts_true_neighbours():
    drawn = clustered(400, 12, 0, 20)
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=1), 1, atol=1e-6)
    vectors, queries = drawn[:380], drawn[380:]
    _, truth = exact_neighbours(vectors, queries, 10)
    assert recall(truth[:, ::-1], truth) == 1
    half = np.where(np.arange(10) < 5, truth, -1)
    assert recall(half, truth) == 0.5


@pytest.mark.parametrize("name", ["faiss", "hnswlib", "usearch"])
def test_a_peer_finds_what_was_built_saved_opened_and_appended(name, tmp_path):
    package = {"faiss": "faiss", "hnswlib": "hnswlib", "usearch": "usearch.index"}[name]
    pytest.importorskip(package, reason=f"{name} is not installed: pip install 'kafjax[bench]'")
    vectors = clustered(1_100, 16, 0, 20)
    engine = ENGINES[name]()
    engine.build(vectors[:1_000])
    engine.save(tmp_path)
    opened = ENGINES[name]()
    opened.open(tmp_path)
    opened.set(opened.grid[-1])
    assert (
        recall(opened.search(vectors[:50]), exact_neighbours(vectors[:1_000], vectors[:50], 10)[1])
        >= 0.95
    )
    opened.append(vectors[1_000:])
    assert (
        recall(opened.search(vectors[-50:]), exact_neighbours(vectors, vectors[-50:], 10)[1])
        >= 0.95
    )


@pytest.mark.multiprocess
def test_an_unknown_engine_is_told(benchmark, tmp_path):
    done = benchmark("--engines=fais", f"--out={tmp_path}")
    assert (done.code, done.out) == (2, "")
    told = "error: --engines: unknown 'fais'. Did you mean 'faiss'?"
    assert done.err.strip().splitlines()[-1] == told
