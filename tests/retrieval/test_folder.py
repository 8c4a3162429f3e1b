"""A saved folder appears whole or not at all, whenever the writer dies, and takes the place of
nothing but its own kind."""

from __future__ import annotations

import dataclasses
import os
import resource
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest

from kafjax.core.errors import UserError
from kafjax.retrieval import ExactIndex, ScannIndex, folder, load_index


def write(directory: Path, text: str) -> None:
    with folder.committing(directory) as path:
        segment = path / f"segment-{uuid.uuid4().hex[:12]}"
        segment.mkdir()
        (segment / "a.txt").write_text(text)
        record = folder.SegmentRecord(segment.name, 1, folder.sealed(segment))
        folder.write_manifest(path, "test", segments=[dataclasses.asdict(record)])


def read(directory: Path) -> str:
    def whole(path: Path) -> str:
        manifest = folder.read_manifest(path, "test")
        with folder.checking(path, manifest):
            return (path / manifest.segments[0].name / "a.txt").read_text()

    return folder.reading(directory, whole)


def test_written_and_replaced(tmp_path):
    write(tmp_path / "deep" / "folder", "one")
    write(tmp_path / "deep" / "folder", "two")
    assert read(tmp_path / "deep" / "folder") == "two"
    assert (
        os.listdir(tmp_path / "deep") == ["folder"]
        and len(os.listdir(tmp_path / "deep" / "folder")) == 2
    )


@pytest.mark.parametrize("before", [None, "old"])
def test_an_error_while_writing_leaves_what_was_there(tmp_path, before):
    if before is not None:
        write(tmp_path / "f", before)
    with pytest.raises(ZeroDivisionError), folder.committing(tmp_path / "f") as path:
        (path / "segment-0123456789ab").mkdir()
        1 / 0  # noqa: B018
    assert [path.name for path in tmp_path.rglob("segment-0123456789ab")] == []
    assert os.listdir(tmp_path) == (["f"] if before else [])
    assert before is None or read(tmp_path / "f") == before


@pytest.mark.parametrize("engine", [ExactIndex, ScannIndex])
def test_a_full_disk_leaves_the_old_index(tmp_path, engine):
    rng = np.random.default_rng(0)
    index = engine()
    index.build(["a"], rng.normal(size=(1, 512)))
    index.save(tmp_path / "i")
    index.append([f"b{i}" for i in range(1_000)], rng.normal(size=(1_000, 512)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write"):
            index.save(tmp_path / "i")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_index(tmp_path / "i").ids == ("a",)
    assert os.listdir(tmp_path) == ["i"]


@pytest.mark.parametrize(
    "manifest", [None, "{}", "not json", '{"name": "some web app", "kind": "app", "files": {}}']
)
def test_other_peoples_files_are_not_replaced(tmp_path, manifest):
    (tmp_path / "thesis.tex").write_text("x")
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(UserError, match="choose another folder"):
        write(tmp_path, "new")
    assert (tmp_path / "thesis.tex").read_text() == "x"


def test_a_file_put_beside_ours_is_not_lost(tmp_path):
    write(tmp_path / "f", "old")
    (tmp_path / "f" / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="choose another folder"):
        write(tmp_path / "f", "new")
    assert (tmp_path / "f" / "notes.txt").exists()


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "f").write_text("x")
    with pytest.raises(UserError, match="choose another folder"):
        write(tmp_path / "f", "new")
    with pytest.raises(UserError, match="cannot write"):
        write(tmp_path / "f" / "below", "new")


def test_a_link_is_followed(tmp_path):
    write(tmp_path / "f", "old")
    (tmp_path / "link").symlink_to(tmp_path / "f")
    write(tmp_path / "link", "new")
    assert read(tmp_path / "f") == "new"
    assert (tmp_path / "link").is_symlink()


def test_copies_are_as_good(tmp_path):
    write(tmp_path / "f", "one")
    shutil.copytree(tmp_path / "f", tmp_path / "g")
    assert read(tmp_path / "g") == "one"


SAVE = """
import pathlib, sys
import numpy as np
from kafjax.core.records import Passage
from kafjax.retrieval import ExactIndex, Store

def store(n):
    index = ExactIndex()
    index.build([f"p{i}" for i in range(n)], np.full((n, 4), n, np.float32))
    return Store(index, [Passage(f"p{i}", str(n)) for i in range(n)])

saves, stop = 0, pathlib.Path(sys.argv[2])
while saves == 0 or not stop.exists():
    store((3, 200)[saves % 2]).save(sys.argv[1])
    saves += 1
print(saves)
"""
READ = """
import sys, time
import numpy as np
from kafjax.retrieval import Store

# A number of reads, not of seconds: a busy machine does fewer in a second.
reads, sizes, until = 0, set(), time.monotonic() + 90
while (reads < 200 or len(sizes) < 2) and time.monotonic() < until:
    store = Store.load(sys.argv[1])
    n = len(store)
    assert n in (3, 200) and {p.text for p in store.passages} == {str(n)}, n
    assert (np.asarray(store.index._vectors_CxD)[:n] == n).all()
    sizes.add(n)
    reads += 1
print(reads, *sorted(sizes))
"""


@pytest.mark.multiprocess
def test_readers_beside_a_writer_see_one_save_as_a_whole(tmp_path, record_property):
    """Two processes read what a third one replaces all the time."""

    stop = tmp_path / "stop"

    def start(script: str) -> subprocess.Popen:
        command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "store"), str(stop)]
        environ = {**os.environ, "JAX_PLATFORMS": "cpu"}
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ
        )

    stop.touch()
    # one save, so that there is something to read
    assert start(SAVE).communicate(timeout=120)[1] == ""
    stop.unlink()
    writer, *readers = [start(SAVE), start(READ), start(READ)]
    have_read = [process.communicate(timeout=240) for process in readers]
    stop.touch()
    outcomes = [writer.communicate(timeout=120), *have_read]
    stop.unlink()
    assert [error for _, error in outcomes] == ["", "", ""]
    saves, *reads = [list(map(int, out.split())) for out, _ in outcomes]
    record_property("saves and reads", [saves, reads])
    print(f"{saves[0]} saves, {sum(row[0] for row in reads)} reads")
    assert saves[0] > 20 and all(row[0] >= 200 and row[1:] == [3, 200] for row in reads)
    assert os.listdir(tmp_path) == ["store"]


def test_what_a_killed_writer_left_is_not_read_and_the_next_one_deletes_it(tmp_path):
    write(tmp_path / "f", "old")
    (tmp_path / "f" / "segment-0123456789ab").mkdir()
    (tmp_path / "f" / f".manifest.json.{'0' * 32}.tmp").touch()
    (tmp_path / ".f.0123.tmp").mkdir()
    assert read(tmp_path / "f") == "old"
    assert len(os.listdir(tmp_path / "f")) == 4
    write(tmp_path / "f", "new")
    assert (
        read(tmp_path / "f") == "new"
        and os.listdir(tmp_path) == ["f"]
        and len(os.listdir(tmp_path / "f")) == 2
    )


def test_what_is_replaced_while_it_is_read_is_read_again(tmp_path):
    write(tmp_path / "f", "old")
    looks = []

    def slow(path: Path) -> str:
        manifest = folder.read_manifest(path, "test")
        if not looks:
            write(tmp_path / "f", "new")
        looks.append(manifest.save)
        return (path / manifest.segments[0].name / "a.txt").read_text()

    assert folder.reading(tmp_path / "f", slow) == "new" and len(set(looks)) == 2


def test_a_reader_of_a_folder_that_never_rests_gives_up(tmp_path):
    def replaced(path: Path) -> None:
        (path / "manifest.json").write_text(str(next(numbers)))
        raise FileNotFoundError

    numbers = iter(range(10**6))
    write(tmp_path / "f", "old")
    with pytest.raises(UserError, match="was replaced 100 times"):
        folder.reading(tmp_path / "f", replaced)
