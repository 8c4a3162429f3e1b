"""The index of a lab is built by one process, and is whole when `built.json` is there."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
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
    # it was loaded
    assert dataclasses.replace(lab).store.index.ids == ids and record.stat().st_mtime_ns == before


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


def _with_passages(lab, passages):
    return dataclasses.replace(
        lab, corpus=dataclasses.replace(lab.corpus, passages=tuple(passages))
    )


def _counting(lab, monkeypatch):
    """The texts that the lab's embedder is asked for as documents."""
    asked: list[str] = []
    embed = lab.embedder.embed_documents

    def counted(texts, progress=None):
        asked.extend(texts)
        return embed(texts, progress)

    monkeypatch.setattr(lab.embedder, "embed_documents", counted)
    return asked


def test_a_changed_corpus_embeds_only_what_is_new_and_finds_as_a_fresh_index_does(
    make_lab, monkeypatch
):
    lab, _ = make_lab()
    first = lab.corpus.passages
    assert len(lab.store) == len(first)
    changed = dataclasses.replace(first[1], text="Mira Toll keeps two ferries on the lake.")
    added = dataclasses.replace(
        first[0], id="new#0", document="new", text="Bees winter in the old mill."
    )
    moved = dataclasses.replace(first[2], source=None)
    passages = [changed, moved, *first[3:], added]  # the first is gone
    later = _with_passages(lab, passages)
    asked = _counting(later, monkeypatch)
    assert set(later.store.ids) == {passage.id for passage in passages}
    assert sorted(asked) == sorted([changed.text, added.text])
    fresh = _with_passages(make_lab()[0], passages)
    queries = [question.text for question in lab.corpus.questions] + [changed.text, added.text]
    for ours, theirs in zip(
        later.retriever.search(queries, 3), fresh.retriever.search(queries, 3), strict=True
    ):
        assert [hit.passage for hit in ours] == [hit.passage for hit in theirs]
        np.testing.assert_allclose(
            [hit.score for hit in ours], [hit.score for hit in theirs], atol=1e-5
        )
    asked.clear()
    again = _with_passages(lab, passages)  # from the disk
    unasked = _counting(again, monkeypatch)
    assert again.store.passages == later.store.passages and unasked == []


def test_words_alone_follow_the_corpus_too(make_lab):
    lab, _ = make_lab(retriever="lexical")
    assert lab.store.index is None
    added = dataclasses.replace(
        lab.corpus.passages[0], id="new#0", text="Bees winter in the old mill."
    )
    later = _with_passages(lab, [*lab.corpus.passages[2:], added])
    assert later.retriever.search(["Who winters in the mill?"], 1)[0][0].passage == added
    assert set(later.store.ids) == {passage.id for passage in later.corpus.passages}


def test_a_given_index_is_searched_and_left_as_it_is(make_lab):
    made, _ = make_lab()
    queries = [question.text for question in made.corpus.questions]
    expected = made.retriever.search(queries, 2)
    path = made.store_folder
    files = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    lab = dataclasses.replace(make_lab()[0], index=path)
    lab.check_retriever()
    assert lab.retriever.search(queries, 2) == expected
    assert (
        not (lab.folder / "index").exists()
        and {file: file.stat().st_mtime_ns for file in path.rglob("*")} == files
    )
    assert lab.index_record.seconds == 0 and lab.index_record.flops == made.index_record.flops
    assert str(path) in lab.retriever_note


def test_a_given_index_of_other_passages_is_refused(make_lab):
    made, _ = make_lab()
    assert len(made.store)
    lab = dataclasses.replace(make_lab()[0], index=made.store_folder)
    other = dataclasses.replace(made.corpus.passages[0], text="another text")
    with pytest.raises(
        UserError, match=f"does not hold the passages of .*: 1 differ, such as '{other.id}'"
    ):
        _with_passages(lab, [other, *made.corpus.passages[1:]]).check_retriever()
    lexical = dataclasses.replace(make_lab(retriever="lexical")[0])
    assert len(lexical.store)
    with pytest.raises(UserError, match="needs vectors"):
        dataclasses.replace(lab, index=lexical.store_folder).check_retriever()


def test_a_given_index_keeps_the_recall_that_it_was_built_for(make_lab):
    made, _ = make_lab(engine="scann", recall=0.9)
    assert made.store.index.recall == 0.9
    given = {"engine": "auto", "recall": 0.9}
    dataclasses.replace(make_lab(**given)[0], index=made.store_folder).check_retriever()
    other = dataclasses.replace(make_lab(**{**given, "recall": 0.8})[0], index=made.store_folder)
    with pytest.raises(UserError, match=r"--recall=0.8: --index=.* was built with 0.9; leave"):
        other.check_retriever()
