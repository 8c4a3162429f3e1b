"""The index of a lab is built by one process, and is whole when `built.json` is there."""

from __future__ import annotations

import dataclasses
import threading

import pytest

from kafjax.core.errors import UserError
from kafjax.core.lock import hold
from kafjax.core.rundir import read_json


def test_an_index_that_was_cut_off_before_its_record_is_built_again(make_lab):
    lab, _ = make_lab()
    ids = lab.store.index.ids
    record = lab.folder / "index" / "built.json"
    assert read_json(record)["engine"] == "exact"
    record.unlink()
    again = dataclasses.replace(lab)
    assert again.store.index.ids == ids and again.index_record.seconds > 0
    before = record.stat().st_mtime_ns
    assert dataclasses.replace(lab).store.index.ids == ids and record.stat().st_mtime_ns == before  # it was loaded


def test_an_index_that_another_builds_is_refused(make_lab):
    lab, _ = make_lab()
    held, done = threading.Event(), threading.Event()

    def build() -> None:
        with hold(lab.folder / "index"):
            held.set()
            done.wait(60)

    thread = threading.Thread(target=build)
    thread.start()
    held.wait(60)
    try:
        with pytest.raises(UserError, match="index is being written by another thread"):
            _ = lab.store
    finally:
        done.set()
        thread.join()
    assert not (lab.folder / "index").exists()
