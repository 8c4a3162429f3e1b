"""Stores in buckets: two machines, each with a copy of its own, see one store."""

from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np
import pytest

from kafjax.core import paths
from kafjax.core.errors import UserError
from kafjax.core.paths import as_path
from kafjax.core.records import Passage
from kafjax.retrieval import Hit, Store, mirror, open_index

PASSAGES = [Passage(f"p{i}", f"text {i}", document=f"d{i}") for i in range(20)]
VECTORS = np.eye(len(PASSAGES), 32, dtype=np.float32)
NEW, ITS_VECTOR = Passage("new", "fresh"), np.eye(32, dtype=np.float32)[31:]


def made() -> Store:
    index = open_index("exact")
    index.build([p.id for p in PASSAGES], VECTORS)
    return Store(index, PASSAGES)


@pytest.fixture(params=["google", "amazon"])
def address(request) -> str:
    return f"{request.getfixturevalue(request.param)}/{uuid.uuid4().hex[:8]}/index"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Makes this process another machine, whose cache is its own."""

    def become(name: str) -> None:
        monkeypatch.setenv("KAFJAX_CACHE", str(tmp_path / name))

    become("a")
    return become


def test_store_in_a_bucket_is_changed_here_and_seen_there(address, machine):
    made().save(address)
    before = paths.files_under(as_path(address))
    machine("b")
    store = Store.load(address)
    assert [row[0] for row in store.search(VECTORS, 1)] == [Hit(p, 1.0) for p in PASSAGES]
    store.append([NEW], ITS_VECTOR)
    store.delete(["p3"])
    store.save(address)
    assert before < paths.files_under(as_path(address))  # a change is a segment beside the others
    machine("a")
    here = mirror.copy_of(as_path(address))
    unchanged = {file: file.stat().st_mtime_ns for file in here.glob("segment-*/*")}
    seen = Store.load(address)
    assert seen.search(ITS_VECTOR, 1) == [[Hit(NEW, 1.0)]] and "p3" not in seen.ids
    assert unchanged == {file: file.stat().st_mtime_ns for file in unchanged}
    assert len(list(here.glob("segment-*"))) == 2
    seen.delete([f"p{i}" for i in range(10, 20)])  # a merge: the older segments go
    seen.save(address)
    assert len({name.partition("/")[0] for name in paths.files_under(as_path(address))}) == 2
    machine("b")
    assert Store.load(address).ids == seen.ids


def test_change_of_what_another_machine_has_changed_is_refused(address, machine):
    made().save(address)
    stale = Store.load(address)
    machine("b")
    other = Store.load(address)
    other.delete(["p1"])
    other.save(address)
    machine("a")
    stale.delete(["p2"])
    with pytest.raises(UserError, match="was changed by another process after it was read"):
        stale.save(address)
    assert "p2" in Store.load(address).ids


@pytest.mark.parametrize("address", ["google"], indirect=True)
def test_upload_that_is_cut_off_leaves_the_store_before_it(address, machine, monkeypatch):
    made().save(address)
    store = Store.load(address)
    store.append([NEW], ITS_VECTOR)

    put, whole = paths.upload, paths.files_under(as_path(address))

    def dies(file: Path, path: Path) -> None:
        put(file, path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(paths, "upload", dies)
        with pytest.raises(KeyboardInterrupt):
            store.save(address)
    assert whole < paths.files_under(as_path(address))
    for name in (
        "a",
        "b",
    ):  # the machine that died has its change in its copy, which does not count
        machine(name)
        assert Store.load(address).ids == tuple(p.id for p in PASSAGES)
    again = Store.load(address)
    again.append([NEW], ITS_VECTOR)
    again.save(address)
    named = {name.partition("/")[0] for name in paths.files_under(as_path(address))}
    assert len(named) == 3  # the manifest and two segments: what was left is gone


@pytest.mark.parametrize("address", ["google"], indirect=True)
def test_other_files_and_empty_places_of_a_bucket_are_told_of(address, machine):
    with pytest.raises(UserError, match=r"holds no manifest\.json"):
        Store.load(address)
    paths.write(as_path(address) / "letters.txt", b"mine")
    with pytest.raises(UserError, match="holds files that were not saved by kafjax"):
        made().save(address)
    assert paths.files_under(as_path(address)) == {"letters.txt"}


@pytest.mark.parametrize("address", ["google"], indirect=True)
def test_truncated_copy_is_fetched_anew(address, machine):
    made().save(address)
    for file in mirror.copy_of(as_path(address)).glob("segment-*/*"):
        file.write_bytes(file.read_bytes()[:-1])
    assert Store.load(address).search(VECTORS[:1], 1) == [[Hit(PASSAGES[0], 1.0)]]


@pytest.mark.parametrize("address", ["google"], indirect=True)
def test_manifest_of_a_bucket_writes_nowhere_else(address, machine, tmp_path):
    made().save(address)
    manifest = as_path(address) / "manifest.json"
    (name,) = {n.partition("/")[0] for n in paths.files_under(as_path(address))} - {manifest.name}
    paths.write(manifest, paths.read(manifest).replace(name.encode(), b"../../../elsewhere"))
    with pytest.raises(UserError, match="damaged"):
        Store.load(address)
