"""Passages beside their index: always the same ids, on disk too."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest

from kafjax.core.errors import UserError
from kafjax.core.records import Passage, Source
from kafjax.retrieval import Hit, Store, open_index, texts

TEXTS = [
    "plain",
    "two\nlines",
    'quotes " and \\',
    ".",
    "ends of lines: \u2028 \u0085 \x0b \r",
    "日本語 🜚",
]
PASSAGES = [Passage(f"p{i}", text, document=f"d{i // 2}") for i, text in enumerate(TEXTS)]
VECTORS = np.eye(len(TEXTS), 8, dtype=np.float32)


@pytest.fixture(params=["exact", "scann"])
def store(request) -> Store:
    index = open_index(request.param)
    index.build([p.id for p in PASSAGES], VECTORS)
    return Store(index, PASSAGES)


def test_search_gives_the_passages(store):
    assert store.search(VECTORS, 1) == [[Hit(p, 1.0)] for p in PASSAGES]
    assert len(store.search(VECTORS[:1], 4)[0]) == 4


def test_append_and_delete_keep_text_and_index_together(store):
    new = Passage("new", "fresh")
    vector = np.eye(8, dtype=np.float32)[7:]
    store.append([new], vector)
    store.delete(["p0", "p3"])
    assert store.search(vector, 1) == [[Hit(new, 1.0)]]
    assert len(store) == len(store.index) == len(PASSAGES) - 1
    assert {hit.passage.id for hit in store.search(vector, 50)[0]} == {
        "new",
        "p1",
        "p2",
        "p4",
        "p5",
    }


def test_sources_of_passages_are_kept_through_saves_and_merges(store, tmp_path):
    """Compared one by one: a source is no part of a passage's equality."""
    places = {
        "new": Source("a/guide.md", ("Guide", "Install"), (10, 42), (3, 5)),
        "paper": Source("paper.pdf", page=7),
    }
    for n, (id, source) in enumerate(places.items()):
        store.append([Passage(id, "fresh", "d", source)], np.eye(8, dtype=np.float32)[6 + n :][:1])
        store.save(tmp_path / "a")
        store = Store.load(tmp_path / "a")
    store.delete(["p0", "p1", "p2"])
    store.save(tmp_path / "a")
    loaded = Store.load(tmp_path / "a")
    assert loaded.stats.n_segments == 1
    assert {passage.id: passage.source for passage in loaded.passages} == {
        "p3": None,
        "p4": None,
        "p5": None,
        **places,
    }


def test_a_store_written_before_passages_had_sources_opens(store, tmp_path, monkeypatch):
    def line(self, id: str, number: int) -> bytes:
        passage = self.passage(id, number)
        return (
            json.dumps({"id": id, "text": passage.text, "document": passage.document}).encode()
            + b"\n"
        )

    with monkeypatch.context() as patch:
        patch.setattr(texts.Texts, "line", line)
        store.save(tmp_path / "a")
    loaded = Store.load(tmp_path / "a")
    assert sorted(loaded.passages, key=lambda passage: passage.id) == PASSAGES
    assert all(passage.source is None for passage in loaded.passages)


def test_a_merge_copies_the_lines_that_are_on_disk_and_refuses_damaged_ones(store, tmp_path):
    store.save(tmp_path / "a")
    (before,) = (tmp_path / "a").glob("segment-*/passages.jsonl")
    lines = before.read_bytes().splitlines(keepends=True)
    store = Store.load(tmp_path / "a")
    store.save(tmp_path / "copy")
    (copied,) = (tmp_path / "copy").glob("segment-*/passages.jsonl")
    assert sorted(copied.read_bytes().splitlines(keepends=True)) == sorted(lines)
    before.write_bytes(before.read_bytes().replace(b"plain", b"plane"))
    store = Store.load(tmp_path / "a")
    with pytest.raises(UserError, match=r"passages\.jsonl: row \d: it is damaged; build it again"):
        store.save(tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("damage", [False, True])
def test_a_store_saved_with_sha256_sums_opens_and_is_checked_by_them(store, tmp_path, damage):
    store.save(tmp_path / "a")
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    for segment in manifest["segments"]:
        for name, record in segment["files"].items():
            del record["crc32"]
            record["sha256"] = hashlib.sha256(
                (tmp_path / "a" / segment["name"] / name).read_bytes()
            ).hexdigest()
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(manifest))
    if not damage:
        assert Store.load(tmp_path / "a").search(VECTORS, 1) == store.search(VECTORS, 1)
        return
    (path,) = (tmp_path / "a").glob("segment-*/ids.json")
    path.write_bytes(path.read_bytes().replace(b"p0", b"q0"))
    with pytest.raises(UserError, match=r"ids\.json is damaged \(its checksum differs\)"):
        Store.load(tmp_path / "a")


def test_refused_updates_change_nothing(store):
    with pytest.raises(UserError, match="'p1' is already"):
        store.append([Passage("p1", "other")], VECTORS[:1])
    with pytest.raises(UserError, match="'x' is not in the index"):
        store.delete(["p1", "x"])
    assert store.search(VECTORS, 1) == [[Hit(p, 1.0)] for p in PASSAGES]


def test_vectors_of_another_embedder_are_refused(store, tmp_path):
    Store(store.index, PASSAGES, "0123abcd").save(tmp_path / "a")
    assert (
        Store.load(tmp_path / "a", "0123abcd").encoder
        == Store.load(tmp_path / "a").encoder
        == "0123abcd"
    )
    with pytest.raises(UserError, match="was built with another embedding model"):
        Store.load(tmp_path / "a", "ffff0000")


def test_saved_moved_loaded(store, tmp_path):
    store.append([Passage("new", "fresh")], np.eye(8, dtype=np.float32)[7:])
    store.delete(["p0"])
    store.save(tmp_path / "a")
    store.save(tmp_path / "a")  # replaces
    shutil.move(tmp_path / "a", tmp_path / "b")
    loaded = Store.load(tmp_path / "b")
    assert loaded.search(VECTORS, 6) == store.search(VECTORS, 6)
    assert type(loaded.index) is type(store.index)
    loaded.delete(["p1"])
    assert len(loaded) == 5


def test_n_bytes_is_text_and_index_on_disk(store, tmp_path):
    store.save(tmp_path / "a")
    on_disk = sum(p.stat().st_size for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert store.n_bytes() == on_disk - (tmp_path / "a" / "manifest.json").stat().st_size


def test_every_file_is_checked_when_loading(store, tmp_path):
    good, bad = tmp_path / "good", tmp_path / "bad"
    store.save(good)
    for path in [p.relative_to(good) for p in good.rglob("*") if p.is_file()]:
        for spoil in (
            lambda p: p.unlink(),
            lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
        ):
            shutil.rmtree(bad, ignore_errors=True)
            shutil.copytree(good, bad)
            spoil(bad / path)
            with pytest.raises(UserError, match="bad"):
                Store.load(bad)


def test_a_text_that_changed_on_disk_is_refused_when_it_is_read(store, tmp_path):
    store.save(tmp_path / "a")
    (file,) = (tmp_path / "a").rglob("passages.jsonl")
    file.write_bytes(file.read_bytes().replace(b"plain", b"plane"))
    loaded = Store.load(tmp_path / "a")  # texts are not read yet
    assert loaded.search(VECTORS[1:2], 1) == [[Hit(PASSAGES[1], 1.0)]]
    with pytest.raises(UserError, match=r"passages\.jsonl: row 1: it is damaged; build it again"):
        loaded.search(VECTORS[:1], 1)
    with pytest.raises(UserError, match="row 1"):
        _ = loaded.passages


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"id": "p0"}', "row 1: text: it is missing"),
        ("{", "row 1: it is damaged"),
        ("[]", "row 1: input should be"),
    ],
)
def test_rows_that_are_no_passages(store, tmp_path, row, message):
    texts.write(tmp_path, [row.encode()])
    opened = texts.Texts()
    opened.open([tmp_path], [1])
    with pytest.raises(UserError, match=message):
        opened.passage("p0", 0)


def test_a_line_of_another_passage_is_refused(tmp_path):
    texts.write(tmp_path, [b'{"id": "p1", "text": "one"}'])
    opened = texts.Texts()
    opened.open([tmp_path], [1])
    with pytest.raises(UserError, match="row 1: it has the id 'p1', not 'p0'"):
        opened.passage("p0", 0)
    with pytest.raises(UserError, match="not int64"):
        texts.Texts().open([tmp_path], [2])


def test_text_and_vectors_of_different_passages(store):
    with pytest.raises(UserError, match="'p0' has a vector but no text"):
        Store(store.index, PASSAGES[1:])
    with pytest.raises(UserError, match="'zz' has a text but no vector"):
        Store(store.index, [*PASSAGES, Passage("zz", "text")])
    with pytest.raises(UserError, match="'p0' is given twice"):
        Store(store.index, [*PASSAGES, PASSAGES[0]])


def test_a_store_may_start_empty():
    store = Store(open_index("auto"), [])
    assert store.search(VECTORS[:2], 3) == [[], []]
    store.append(PASSAGES, VECTORS)
    assert store.search(VECTORS, 1) == [[Hit(p, 1.0)] for p in PASSAGES]
