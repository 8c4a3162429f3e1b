"""The contract of every engine: validation, growth, saving. Run on the exact engine, the mesh and
both forms of ScaNN."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kafjax.core.errors import UserError
from kafjax.retrieval import (
    ExactIndex,
    Index,
    MeshIndex,
    ScannIndex,
    load_index,
    open_index,
    scann_index,
)

N, D = 300, 24
ENGINES: dict[str, Callable[[], Index]] = {
    "exact": ExactIndex,
    "mesh": MeshIndex,
    "scann-exhaustive": ScannIndex,
    "scann-tree": lambda: ScannIndex(tree_from=100),
}


def unit_vectors(n: int, d: int = D, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def names(n: int, prefix: str = "p") -> list[str]:
    return [f"{prefix}{i}" for i in range(n)]


@pytest.fixture(params=ENGINES)
def index(request) -> Index:
    return ENGINES[request.param]()


@pytest.fixture
def built(index) -> Index:
    index.build(names(N), unit_vectors(N))
    return index


def assert_same_results(a: Index, b: Index, k: int = 5) -> None:
    queries = unit_vectors(20, seed=9)
    a_ids, a_scores = a.search(queries, k)
    b_ids, b_scores = b.search(queries, k)
    assert a_ids == b_ids
    # ScaNN sums in an order that depends on its threads: the last bit may differ from call to call.
    np.testing.assert_allclose(a_scores, b_scores, rtol=0, atol=0 if a.engine == "exact" else 1e-6)


def test_a_stored_vector_finds_itself_with_its_cosine(built):
    vectors = unit_vectors(N)
    ids, scores = built.search(vectors[:50], 3)
    assert [row[0] for row in ids] == names(50)
    assert scores.dtype == np.float32
    for row, query in enumerate(vectors[:50]):
        found = [vectors[int(id[1:])] for id in ids[row]]
        np.testing.assert_allclose(scores[row], np.stack(found) @ query, atol=1e-6)
    assert (np.diff(scores) <= 0).all()


def test_appended_are_found_and_deleted_are_not(built):
    new = unit_vectors(40, seed=1)
    built.append(names(40, "new"), new)
    assert len(built) == N + 40
    looks_everywhere = not isinstance(built, ScannIndex) or built.tree_from > N
    # A tree looks into some leaves only, and they differ from build to build; it looks into all
    # where all vectors are asked for.
    for k in (1, len(built)) if looks_everywhere else (len(built),):
        assert [row[0] for row in built.search(new, k)[0]] == names(40, "new")
    built.delete([*names(40, "new"), "p0", "p7", f"p{N - 1}"])
    assert len(built) == len(built.ids) == N - 3
    every, _ = built.search(unit_vectors(10, seed=2), N)
    expected = set(names(N)) - {"p0", "p7", f"p{N - 1}"}
    assert all(len(row) == N - 3 and set(row) == expected for row in every)


def test_deleted_id_may_come_back_with_another_vector(built):
    new = unit_vectors(1, seed=3)
    built.delete(["p5"])
    built.append(["p5"], new)
    ids, scores = built.search(new, 1)
    assert ids == [["p5"]]
    np.testing.assert_allclose(scores, 1.0, atol=1e-6)


def test_many_random_updates_keep_ids_and_vectors_together(index):
    rng = np.random.default_rng(4)
    contents = dict(zip(names(N), unit_vectors(N), strict=True))
    index.build(list(contents), np.stack(list(contents.values())))
    for round in range(12):
        gone = [
            str(id) for id in rng.choice(list(contents), size=rng.integers(1, 60), replace=False)
        ]
        index.delete(gone)
        for id in gone:
            del contents[id]
        new = dict(
            zip(
                names(int(rng.integers(1, 60)), f"r{round}-"),
                unit_vectors(60, seed=100 + round),
                strict=False,
            )
        )
        index.append(list(new), np.stack(list(new.values())))
        contents |= new
    assert set(index.ids) == contents.keys()
    queries = unit_vectors(10, seed=5)
    # all of them, so that the tree may not leave any out
    ids, scores = index.search(queries, len(contents))
    for row, query in enumerate(queries):
        assert set(ids[row]) == contents.keys()
        np.testing.assert_allclose(
            scores[row], np.stack([contents[id] for id in ids[row]]) @ query, atol=1e-5
        )


def test_an_index_with_one_vector(index):
    vector = unit_vectors(1)
    index.build(["only"], vector)
    assert index.search(vector, 1)[0] == [["only"]]
    index.delete(["only"])
    assert index.search(vector, 1)[0] == [[]]


def test_empty_indexes_search_and_grow(index):
    queries = unit_vectors(3)
    for _ in range(2):  # never built; then emptied
        ids, scores = index.search(queries, 4)
        assert ids == [[], [], []]
        assert scores.shape == (3, 0)
        index.append(names(3), queries)
        assert [row[0] for row in index.search(queries, 1)[0]] == names(3)
        index.delete(names(3))
    index.build([], np.zeros((0, D), np.float32))
    assert len(index) == 0


def test_no_queries(built):
    ids, scores = built.search(np.zeros((0, D), np.float32), 4)
    assert ids == []
    assert scores.shape == (0, 4)


def test_build_replaces(built):
    built.build(["x"], unit_vectors(1, d=7))
    assert built.ids == ("x",)
    assert built.search(unit_vectors(1, d=7), 1)[0] == [["x"]]


def test_the_callers_arrays_are_copied(index):
    # 256: a capacity of the exact engine, where nothing needs padding
    vectors, ids = unit_vectors(256), names(256)
    index.build(ids, vectors)
    before, _ = index.search(unit_vectors(5, seed=9), 5)
    vectors[:] = 0
    ids[:] = ["?"] * 256
    after, scores = index.search(unit_vectors(5, seed=9), 5)
    assert before == after
    assert (scores > 0).all()


def test_k_beyond_the_size_is_clamped_and_told_once(built, caplog):
    with caplog.at_level(logging.WARNING, logger="absl"):
        ids, scores = built.search(unit_vectors(2), N + 50)
        built.search(unit_vectors(2), N + 50)
    assert [sorted(row) for row in ids] == [sorted(names(N))] * 2
    assert scores.shape == (2, N)
    assert not np.isnan(scores).any()
    assert [r.getMessage() for r in caplog.records] == [
        f"k={N + 50} is more than the {N} passages in the index: all of them are returned"
    ]


def with_(vectors: np.ndarray, value: float) -> np.ndarray:
    vectors[2, 3] = value
    return vectors


BAD_VECTORS = {
    "NaN": (with_(unit_vectors(4), np.nan), "id 'q2' holds NaN or infinity"),
    "infinity": (with_(unit_vectors(4), -np.inf), "id 'q2' holds NaN or infinity"),
    "float64 that overflows": (unit_vectors(4).astype(np.float64) * 1e300, "NaN or infinity"),
    "a huge norm (aborts ScaNN's training)": (unit_vectors(4) * 3e18, "longer than 1e\\+06"),
    "another dimension": (unit_vectors(4, d=D + 1), "dimension 24, got vector dimension 25"),
    "one-dimensional": (unit_vectors(4)[0], "2-D"),
    "ragged": ([[1.0, 2.0], [1.0]], "different lengths"),
    "text": (np.array([["a"] * D] * 4), "real numbers"),
    "complex": (unit_vectors(4).astype(np.complex64), "real numbers"),
    "too few": (unit_vectors(3), "4 ids for 3 vectors"),
}


@pytest.mark.parametrize("case", BAD_VECTORS)
def test_bad_vectors_are_refused_and_change_nothing(built, case):
    vectors, message = BAD_VECTORS[case]
    ids_before, _ = built.search(unit_vectors(5), 5)
    with pytest.raises(UserError, match=message):
        built.append(names(4, "q"), vectors)
    if "dimension" not in case:
        with pytest.raises(UserError, match=message):
            built.build(names(4, "q"), vectors)
    assert len(built) == N
    assert built.search(unit_vectors(5), 5)[0] == ids_before


def test_bad_queries_are_refused(built):
    with pytest.raises(UserError, match="query 2 holds NaN"):
        built.search(with_(unit_vectors(4), np.nan), 3)
    with pytest.raises(UserError, match="dimension 24, got query dimension 5"):
        built.search(unit_vectors(4, d=5), 3)
    with pytest.raises(UserError, match="k=0"):
        built.search(unit_vectors(4), 0)


def test_bad_ids_are_refused_and_change_nothing(built):
    new = unit_vectors(2, seed=1)
    for ids, message in (
        (["x", "x"], "'x' is given twice"),
        (["x", "p3"], "'p3' is already in the index"),
        (["x", 3], "must be strings, got 3"),
        ("ab", "list of strings"),
    ):
        with pytest.raises(UserError, match=message):
            built.append(ids, new)
    with pytest.raises(UserError, match="'nobody' is not in the index"):
        built.delete(["p1", "nobody"])
    with pytest.raises(UserError, match="'p1' is given twice"):
        built.delete(["p1", "p1"])
    assert set(built.ids) == set(names(N))


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int32])
def test_other_real_dtypes_are_taken(index, dtype):
    vectors = (unit_vectors(5) * 8).astype(dtype)
    index.build(names(5), vectors)
    np.testing.assert_allclose(
        index.search(vectors[:1], 5)[1][0],
        np.sort(vectors.astype(np.float32) @ vectors[0].astype(np.float32))[::-1],
        rtol=1e-5,
    )


def test_saved_moved_loaded_searches_the_same_and_grows(built, tmp_path):
    built.delete(["p3", "p100"])
    built.append(["ünï\u2028code"], unit_vectors(1, seed=5))
    built.save(tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "elsewhere")
    loaded = load_index(tmp_path / "elsewhere")
    assert type(loaded) is type(built)
    assert set(loaded.ids) == set(built.ids)
    assert loaded.dimension == D
    assert_same_results(built, loaded, k=20)
    for index in (built, loaded):
        index.append(names(30, "late"), unit_vectors(30, seed=6))
        index.delete(["p4", "late2"])
    assert_same_results(built, loaded, k=20)


def test_n_bytes_is_what_lies_on_disk(built, tmp_path):
    built.save(tmp_path / "a")
    assert built.n_bytes() == sum(
        path.stat().st_size for path in (tmp_path / "a").glob("segment-*/*")
    )
    assert built.n_bytes() > N * D * 4


def test_no_pickle_is_written(built, tmp_path):
    built.save(tmp_path / "a")
    assert not [
        path.name for path in (tmp_path / "a").rglob("*") if path.suffix in (".pkl", ".pickle")
    ]


def test_emptied_index_is_saved_and_loaded(built, tmp_path):
    built.delete(names(N))
    built.save(tmp_path / "a")
    loaded = load_index(tmp_path / "a")
    assert len(loaded) == 0
    loaded.append(names(3), unit_vectors(3))
    assert loaded.search(unit_vectors(3), 1)[0] == [["p0"], ["p1"], ["p2"]]


def test_index_without_vectors_cannot_be_saved(index, tmp_path):
    with pytest.raises(UserError, match="never built"):
        index.save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_every_file_is_checked_when_loading(built, tmp_path):
    good = tmp_path / "good"
    built.save(good)
    for path in [path.relative_to(good) for path in good.rglob("*") if path.is_file()]:
        bad = tmp_path / "bad"
        for spoil in (
            lambda p: p.unlink(),
            lambda p: p.write_bytes(p.read_bytes()[:-2]),
            flip_a_bit,
            lambda p: p.write_bytes(b""),
        ):
            shutil.rmtree(bad, ignore_errors=True)
            shutil.copytree(good, bad)
            spoil(bad / path)
            with pytest.raises(UserError, match="bad"):
                load_index(bad)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 0x80
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 7}, "300 different ids for 7 rows"),
        ({"dimension": 7}, r"not float32 \(300, 7\)"),
        ({"engine": "faiss"}, "engine 'faiss'"),
        ({"kind": "kafjax store"}, "not the manifest of a saved index"),
        ({"format": 3}, "format 3, this kafjax reads 1 and 2"),
        ({"segments": []}, "names no segments"),
        ({"segments": [{"name": "../../etc", "count": 1, "files": {}}]}, "damaged"),
        ({"segments": [{"name": "segment-0123456789ab", "count": 300, "files": {}}]}, "is missing"),
        ({"files": {"../../etc/passwd": {"bytes": 1, "sha256": ""}}}, "damaged"),
    ],
)
def test_manifest_that_contradicts_the_files(built, tmp_path, change, message):
    built.save(tmp_path / "a")
    manifest = tmp_path / "a" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        load_index(tmp_path / "a")


def test_loading_what_is_no_index(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        load_index(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no manifest"):
        load_index(tmp_path)


def test_engine_classes_load_only_their_own(tmp_path):
    index = ExactIndex()
    index.build(names(3), unit_vectors(3))
    index.save(tmp_path / "a")
    with pytest.raises(UserError, match="engine 'exact', not 'scann'"):
        ScannIndex.load(tmp_path / "a")


def test_open_index_by_name():
    assert isinstance(open_index("auto"), ScannIndex)
    assert isinstance(open_index("scann"), ScannIndex)
    assert isinstance(open_index("exact"), ExactIndex)
    with pytest.raises(UserError, match=r"'scan'\. Did you mean 'scann'"):
        open_index("scan")


def test_without_scann(built, tmp_path, caplog, monkeypatch):
    built.save(tmp_path / "a")
    # makes the import fail, as where it has no wheel
    monkeypatch.setitem(__import__("sys").modules, "scann", None)
    assert scann_index.why_unavailable() is not None
    for refused in (lambda: open_index("scann"), ScannIndex):
        with pytest.raises(UserError, match=r"pip install 'kafjax\[retrieval\]'"):
            refused()
    with caplog.at_level(logging.WARNING, logger="absl"):
        assert isinstance(open_index("auto"), ExactIndex)
        loaded = load_index(tmp_path / "a")
    assert len(caplog.records) == (2 if built.engine == "scann" else 1)
    assert "exact engine" in caplog.text
    assert isinstance(loaded, ExactIndex if built.engine == "scann" else type(built))
    vectors = unit_vectors(N)
    assert [row[0] for row in loaded.search(vectors, 1)[0]] == names(N)
