"""Saves that cost what has changed: segments beside a base, merged in time, and never anything in
between."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from kafjax.core.errors import UserError
from kafjax.core.records import Passage
from kafjax.retrieval import ExactIndex, Hit, ScannIndex, Store, load_index, segments
from tests.kills import KILLED, in_child

pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
D = 8
ENGINES = {
    "exact": ExactIndex,
    "scann": ScannIndex,
    "scann-tree": lambda: ScannIndex(tree_from=100),
    "words": None,
}


def passages(first: int, n: int, word: str = "text") -> list[Passage]:
    return [
        Passage(f"p{i}", f"{word} {i} \u2028", document=f"d{i}") for i in range(first, first + n)
    ]


def vectors(first: int, n: int, seed: int = 0) -> np.ndarray:
    return np.stack(
        [np.random.default_rng([seed, i]).normal(size=D) for i in range(first, first + n)]
    ).astype(np.float32)


def add(store: Store, first: int, n: int, word: str = "text", seed: int = 0) -> None:
    store.upsert(passages(first, n, word), None if store.index is None else vectors(first, n, seed))


def built(engine: str, n: int = 200) -> Store:
    index = None if ENGINES[engine] is None else ENGINES[engine]()
    if index is not None:
        index.build([passage.id for passage in passages(0, n)], vectors(0, n))
    return Store(index, passages(0, n))


@pytest.fixture(params=ENGINES)
def store(request) -> Store:
    return built(request.param)


def contents(store: Store) -> dict[str, Passage]:
    assert (
        len(store.passages)
        == len(store)
        == (len(store) if store.index is None else len(store.index))
    )
    return {passage.id: passage for passage in store.passages}


def assert_same(a: Store, b: Store) -> None:
    assert contents(a) == contents(b)
    if a.index is not None:
        found, expected = (one.search(vectors(900, 5), len(one)) for one in (a, b))
        assert [[hit.passage.id for hit in row] for row in found] == [
            [hit.passage.id for hit in row] for row in expected
        ]
        exact = a.index.engine == "exact"
        for row, other in zip(found, expected, strict=True):
            scores, others = [hit.score for hit in row], [hit.score for hit in other]
            assert scores == others if exact else np.allclose(scores, others, atol=1e-5)


def segment_names(path: Path) -> list[str]:
    return [
        segment["name"] for segment in json.loads((path / "manifest.json").read_text())["segments"]
    ]


def test_a_save_after_changes_adds_a_segment_and_touches_no_file_of_the_others(store, tmp_path):
    store.save(tmp_path / "s")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").glob("segment-*/*")}
    add(store, 200, 10)
    store.delete(["p3", "p7", "p205"])
    add(store, 5, 2, "changed", seed=1)
    store.save(tmp_path / "s")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    base, newest = segment_names(tmp_path / "s")
    assert base in {path.parent.name for path in before}
    assert len(json.loads((tmp_path / "s" / newest / "ids.json").read_text())) == 10 - 1 + 2
    assert sum(p.stat().st_size for p in (tmp_path / "s" / newest).iterdir()) < 0.2 * sum(
        path.stat().st_size for path in before
    )
    assert_same(Store.load(tmp_path / "s"), store)
    assert Store.load(tmp_path / "s").stats.n_segments == 2 and store.stats.n_unsaved == 0


def test_nothing_is_written_where_nothing_has_changed(store, tmp_path):
    store.save(tmp_path / "s")
    before = (tmp_path / "s" / "manifest.json").read_bytes()
    Store.load(tmp_path / "s").save(tmp_path / "s")
    store.save(tmp_path / "s")
    assert (tmp_path / "s" / "manifest.json").read_bytes() == before


def test_any_history_over_saves_equals_a_fresh_build(store, tmp_path):
    """Appends, upserts and deletes in many saves, each of a store that was read again, merges among
    them."""
    rng, expected, n_merges, names = random.Random(0), contents(store), 0, []
    seeds = dict.fromkeys(expected, 0)
    store.save(tmp_path / "s")
    for turn in range(14):
        store = Store.load(tmp_path / "s")
        gone = rng.sample(sorted(expected), 9)
        store.delete(gone)
        for id in gone:
            del expected[id], seeds[id]
        for first, n, word in (
            (200 + 20 * turn, 20, "text"),
            (rng.randrange(150), 3, f"turn {turn}"),
        ):
            add(store, first, n, word, seed=turn)
            expected |= {passage.id: passage for passage in passages(first, n, word)}
            seeds |= {passage.id: turn for passage in passages(first, n)}
        store.save(tmp_path / "s")
        now = segment_names(tmp_path / "s")
        n_merges += names[:1] != now[:1]
        names = now
    loaded = Store.load(tmp_path / "s")
    assert contents(loaded) == expected and n_merges >= 3
    index = None
    if loaded.index is not None:
        index = type(loaded.index)()
        index.build(
            loaded.ids, np.concatenate([vectors(int(id[1:]), 1, seeds[id]) for id in loaded.ids])
        )
    assert_same(loaded, Store(index, loaded.passages))


@pytest.mark.parametrize("engine", ["exact", "scann", "words"])
def test_a_merge_writes_what_a_fresh_store_would_byte_by_byte(engine, tmp_path):
    for name in ("a", "b"):
        store = built(engine)
        store.save(tmp_path / name)
        for turn in range(4):
            add(store, 200 + 20 * turn, 20)
            store.save(tmp_path / name)
    names = [segment_names(tmp_path / name) for name in ("a", "b")]
    files = [
        [
            {path.name: path.read_bytes() for path in (tmp_path / folder / name).iterdir()}
            for name in segments_of
        ]
        for folder, segments_of in zip(("a", "b"), names, strict=True)
    ]
    assert files[0] == files[1] and len(names[0]) == 2  # merged at 260, and 20 beside it
    Store.load(tmp_path / "a").save(tmp_path / "fresh")
    if engine != "scann":
        built(engine, 280).save(tmp_path / "once")
        once, fresh = (
            {path.name: path.read_bytes() for path in (tmp_path / name).glob("segment-*/*")}
            for name in ("once", "fresh")
        )
        assert once == fresh


def test_many_small_saves_are_merged_too(tmp_path, monkeypatch):
    monkeypatch.setattr(segments, "MOST_SEGMENTS", 5)
    store = built("exact", 1000)
    store.save(tmp_path / "s")
    counts = []
    for i in range(12):
        add(store, 1000 + i, 1)
        store.save(tmp_path / "s")
        counts.append(len(segment_names(tmp_path / "s")))
    assert max(counts) == 5 and counts.count(1) == 2
    assert_same(Store.load(tmp_path / "s"), built("exact", 1012))


def test_a_tree_that_grew_by_segments_finds_nearly_all(tmp_path):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(100, 32))

    def clustered(n: int) -> np.ndarray:
        found = centres[rng.integers(0, 100, n)] + 0.5 * rng.normal(size=(n, 32))
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    everything, queries = clustered(3000), clustered(300)
    names = [str(i) for i in range(3000)]
    index, oracle = ScannIndex(tree_from=1000), ExactIndex()
    index.build(names[:2600], everything[:2600])
    index.save(tmp_path / "i")
    for start in range(2600, 3000, 100):
        index = load_index(tmp_path / "i")
        index.append(names[start : start + 100], everything[start : start + 100])
        index.save(tmp_path / "i")
    loaded = load_index(tmp_path / "i")
    oracle.build(names, everything)
    (found, _), (true, _) = (one.search(queries, 10) for one in (loaded, oracle))
    assert loaded.stats.n_segments == 5
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, true, strict=True)]) >= 0.97


def test_a_change_that_another_process_made_is_not_lost(store, tmp_path):
    store.save(tmp_path / "s")
    other = Store.load(tmp_path / "s")
    add(other, 300, 1)
    other.save(tmp_path / "s")
    add(store, 400, 1)
    with pytest.raises(UserError, match="was changed by another process after it was read"):
        store.save(tmp_path / "s")
    assert "p300" in Store.load(tmp_path / "s").ids
    store.save(tmp_path / "elsewhere")
    assert "p400" in Store.load(tmp_path / "elsewhere").ids


def test_copies_saved_elsewhere_go_their_own_ways(store, tmp_path):
    store.save(tmp_path / "a")
    add(store, 300, 2)
    store.save(tmp_path / "b")
    if store.index is not None:
        store.index.save(tmp_path / "i")  # has no texts, and leaves the store's own state alone
    add(store, 310, 2)
    store.save(tmp_path / "b")
    assert len(Store.load(tmp_path / "a")) == 200 and len(segment_names(tmp_path / "b")) == 2
    assert_same(Store.load(tmp_path / "b"), store)
    assert store.index is None or len(load_index(tmp_path / "i")) == 202


def test_upsert_is_refused_whole(store, tmp_path):
    if store.index is None:
        return
    before = contents(store)
    for bad, message in (
        (vectors(0, 3), "2 ids for 3"),
        (np.full((2, D), np.nan), "NaN"),
        (np.ones((2, D + 1)), "dimension 8"),
    ):
        with pytest.raises(UserError, match=message):
            store.upsert(passages(0, 2, "new"), bad)
    with pytest.raises(UserError, match="need vectors"):
        store.upsert(passages(0, 2, "new"))
    assert contents(store) == before


@pytest.mark.parametrize("damage", ["beyond", "twice", "text", "negative"])
def test_deleted_rows_that_are_not_there_are_refused(tmp_path, damage, monkeypatch):
    monkeypatch.setattr("kafjax.retrieval.folder._check_file", lambda *_: None)
    monkeypatch.setattr("kafjax.retrieval.folder._check_size", lambda *_: None)
    store = built("exact")
    store.save(tmp_path / "s")
    store.delete(["p1"])
    store.save(tmp_path / "s")
    rows = {
        "beyond": np.array([200]),
        "twice": np.array([1, 1]),
        "text": np.array(["a"]),
        "negative": np.array([-1]),
    }[damage]
    np.save(tmp_path / "s" / segment_names(tmp_path / "s")[1] / "deleted.npy", rows)
    with pytest.raises(UserError, match="build it again"):
        Store.load(tmp_path / "s")


@pytest.mark.parametrize("engine", ["exact", "scann", "lexical"])
def test_what_the_release_before_wrote_opens_and_its_next_save_is_of_segments(engine, tmp_path):
    path = shutil.copytree(Path(__file__).parent / "release1" / engine, tmp_path / "s")
    store = Store.load(path)
    texts = ["plain", "two\nlines", "日本語"]
    assert store.passages == [Passage(f"p{i}", text, f"d{i // 2}") for i, text in enumerate(texts)]
    if engine != "lexical":
        assert store.index.engine == engine and store.encoder == "0123abcd"
        assert store.search(np.eye(3, 4), 1) == [[Hit(passage, 1.0)] for passage in store.passages]
        assert len(load_index(path / "index")) == 3
    store.delete(["p1"])
    store.append([Passage("new", "x")], None if store.index is None else np.eye(4)[3:])
    store.save(path)
    assert sorted(re.sub("-.*", "", name) for name in os.listdir(path)) == [
        "manifest.json",
        "segment",
    ]
    assert {passage.text for passage in Store.load(path).passages} == {"plain", "日本語", "x"}


def change(path: Path, turn: int) -> None:
    """One change of every kind, in one save."""
    store = Store.load(path)
    store.delete([f"p{turn}"])
    add(store, 1000 + turn, 1)
    add(store, 100, 3, f"turn {turn}", seed=turn)
    store.save(path)


def assert_state(store: Store, turns: int) -> None:
    ids = {passage.id: passage.text for passage in store.passages}
    assert ids.keys() == {f"p{i}" for i in range(turns, 200)} | {
        f"p{1000 + i}" for i in range(turns)
    }
    assert all(
        ids[f"p{i}"].startswith(f"turn {turns - 1} " if turns else "text ") for i in (100, 101, 102)
    )


@pytest.mark.parametrize("merges", [False, True])
def test_a_kill_before_any_file_operation_of_a_change_leaves_all_or_nothing_of_it(
    merges, tmp_path, monkeypatch, record_property
):
    if merges:
        monkeypatch.setattr(segments, "MOST_SEGMENTS", 1)
    built("words").save(tmp_path / "start")
    n = 0
    while True:
        n += 1
        path = shutil.copytree(tmp_path / "start", tmp_path / str(n) / "s")
        code, _ = in_child(lambda path=path: change(path, 0), path, n)
        assert code in (0, KILLED)
        turns = 1 if "p1000" in Store.load(path).ids else 0
        assert_state(Store.load(path), turns)
        assert code == KILLED or turns == 1
        change(path, turns)
        assert_state(Store.load(path), turns + 1)
        assert {p.name for p in path.iterdir()} == {"manifest.json", *segment_names(path)}
        if code == 0:
            break
    assert n > 10
    record_property("kills", n - 1)


@pytest.mark.slow
def test_200_kills_at_random_moments_lose_nothing(tmp_path, record_property):
    """A child makes changes one after another, saying each before it begins; it is killed at a
    random moment."""
    path, rng, turns, kills = tmp_path / "s", random.Random(0), 0, 0
    built("words").save(path)
    while kills < 200:
        if turns >= 90:
            shutil.rmtree(path)
            built("words").save(path)
            turns = 0
        child = os.fork()
        if child == 0:
            try:
                for turn in range(turns, 99):
                    change(path, turn)
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0.0, 0.04))
        os.kill(child, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL:
            kills += 1
        store = Store.load(path)
        now = sum(id.startswith("p1") and int(id[1:]) >= 1000 for id in store.ids)
        assert now >= turns
        assert_state(store, now)
        turns = now
    record_property("kills", kills)
