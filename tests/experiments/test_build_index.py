"""An index on disk: built, asked, grown and shrunk, and never at the cost of what was there."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest

from kafjax import hub
from kafjax.retrieval import Embedder, Store
from tests import tiny
from tests.experiments.commands import refused


@pytest.fixture
def index(build_index, world, tmp_path):
    """Runs build_index on the folder `tmp_path/index`."""

    def run(*arguments):
        return build_index(
            f"--embedder={world.bert}", f"--out={tmp_path / 'index'}", "--engine=exact", *arguments
        )

    return run


@pytest.fixture(scope="module")
def once_built(build_index, world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "index"
    outcome = build_index(
        f"--embedder={world.bert}", f"--out={folder}", "--engine=exact", f"--corpus={world.corpus}"
    )
    assert outcome.code == 0, outcome.err
    return folder


@pytest.fixture
def built(once_built, tmp_path):
    """An index of the corpus in `tmp_path/index`: a copy, since the folder may be moved."""
    return shutil.copytree(once_built, tmp_path / "index")


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def documents_file(path, *rows):
    path.write_text("".join(json.dumps({"id": id, "contents": text}) + "\n" for id, text in rows))
    return path


def hits(outcome):
    assert outcome.code == 0, outcome.err
    return [
        (id, float(score))
        for score, id in re.findall(r"^ *\d+\. (-?[\d.]+)  \[(\S+)\]", outcome.out, re.MULTILINE)
    ]


def test_says_what_was_built(index, world, tmp_path):
    outcome = index(f"--corpus={world.corpus}")
    size = sum(len(data) for data in contents(tmp_path / "index").values())
    assert f"{tmp_path / 'index'}: 6 passages, 32 dimensions, exact, {size:,} bytes" in outcome.out
    assert re.search(r"embedded and indexed 6 passages in [\d.]+ s, \d+ passages/s", outcome.out)


def test_finds_what_is_nearest(index, built, world):
    model, params = hub.load(str(world.bert))
    embedder = Embedder(model, params, hub.tokenizer(str(world.bert)))
    texts = {f"{row['id']}#0": row["contents"] for row in tiny.documents()}
    cosines = embedder.embed(list(texts.values())) @ embedder.embed(["Who makes maps?"])[0]
    best = np.argsort(-cosines)[:3]
    outcome = index("--query=Who makes maps?", "--k=3")
    expected = [list(texts)[i] for i in best]
    assert [id for id, _ in hits(outcome)] == expected
    assert np.allclose([score for _, score in hits(outcome)], cosines[best], atol=1e-3)
    assert all(f"[{id}] {texts[id]}" in outcome.out for id in expected)


def test_an_index_with_vectors_is_asked_by_words_and_by_both_too(index, built):
    (by_words,) = {tuple(hits(index("--query=Who makes MAPS?", "--retriever=lexical", "--k=1")))}
    assert [id for id, _ in by_words] == ["doc4#0"]
    both = hits(index("--query=Who makes maps?", "--retriever=hybrid", "--k=6"))
    assert len(both) == 6 and both[0][1] <= 0.033 and both == sorted(both, key=lambda hit: -hit[1])
    assert "no passage holds a word of the query" in index("--query=zzz", "--retriever=lexical").out


def test_an_index_of_words_needs_no_embedder_and_has_no_vectors(build_index, world, tmp_path):
    words = ["--retriever=lexical", "--embedder=/nowhere", f"--out={tmp_path / 'words'}"]
    outcome = build_index(*words, f"--corpus={world.corpus}", "--query=Who makes maps?", "--k=1")
    assert "6 passages, no vectors" in outcome.out and [id for id, _ in hits(outcome)] == ["doc4#0"]
    new = documents_file(tmp_path / "new.jsonl", ("news", "Ada Quill draws charts."))
    assert (
        hits(build_index(*words, f"--append={new}", "--delete=doc4", "--query=charts maps"))[0][0]
        == "news#0"
    )
    assert len(Store.load(tmp_path / "words")) == 6
    outcome = build_index(f"--embedder={world.bert}", f"--out={tmp_path / 'words'}", "--query=maps")
    assert "--retriever=dense needs vectors, these passages have none" in refused(outcome)


def test_what_is_no_reranker_is_refused_before_anything_is_built(index, world, tmp_path):
    assert "is no reranker" in refused(
        index(f"--corpus={world.corpus}", f"--reranker={world.bert}")
    )
    assert not (tmp_path / "index").exists()


def test_another_embedder_cannot_ask(build_index, built, world, tmp_path):
    other = tiny.write_bert(tmp_path / "other", seed=1)
    outcome = build_index(f"--embedder={other}", f"--out={built}", "--query=Who makes maps?")
    assert (
        "was built with another embedding model; give the --embedder and --embedder_dtype it was built with"
        in refused(outcome)
    )


def test_chunk_cuts_documents(index, built, world):
    # and takes the place of the old one
    assert "12 passages" in index(f"--corpus={world.corpus}", "--chunk=sentence").out
    assert len(Store.load(built)) == 12


def test_questions_are_not_needed(index, tmp_path):
    corpus = tiny.write_corpus(tmp_path / "mute", questions=None)
    assert index(f"--corpus={corpus}", "--query=bells").code == 0


def test_appending_gives_what_building_at_once_gives(index, build_index, built, world, tmp_path):
    news = [("news1", "Rosa Quint plays the cello."), ("news2", "The cello was made in Harnsea.")]
    before = Store.load(built).index.ids
    outcome = index(
        f"--append={documents_file(tmp_path / 'news.jsonl', *news)}",
        "--query=Who plays the cello?",
        "--k=8",
    )
    assert "8 passages" in outcome.out and "embedded and indexed 2 passages" in outcome.out
    assert Store.load(built).index.ids == (*before, "news1#0", "news2#0")
    everything = [*((row["id"], row["contents"]) for row in tiny.documents()), *news]
    (tmp_path / "together").mkdir()
    documents_file(tmp_path / "together" / "corpus.jsonl", *everything)
    options = [
        f"--embedder={world.bert}",
        "--engine=exact",
        "--query=Who plays the cello?",
        "--k=8",
    ]
    together = build_index(
        *options, f"--corpus={tmp_path / 'together'}", f"--out={tmp_path / 'other'}"
    )
    assert hits(outcome) == hits(together)


def test_delete_and_append_replace_a_document(index, built, tmp_path):
    new = documents_file(tmp_path / "new.jsonl", ("doc0", "Mira Toll was born in Paris."))
    assert "is already in the index" in refused(index(f"--append={new}"))
    assert index("--delete=doc0,doc1#0", f"--append={new}").code == 0
    store = Store.load(built)
    assert set(store.index.ids) == {"doc0#0", "doc2#0", "doc3#0", "doc4#0", "doc5#0"}
    assert hits(index("--query=Mira Toll was born in Paris.", "--k=1")) == [("doc0#0", 1.0)]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--delete=doc0,doc9"],
            "--delete: no document or passage 'doc9' in the index. Did you mean",
        ),
        (["--append=/nowhere.jsonl"], "/nowhere.jsonl does not exist"),
        (["--query=bells", "--embedder=minilmm"], "Did you mean 'minilm'?"),
    ],
)
def test_a_refused_change_changes_nothing(index, built, arguments, expected):
    before = contents(built)
    assert expected in refused(index(*arguments))
    assert contents(built) == before


def test_a_broken_line_is_named_and_nothing_appended(index, built, tmp_path):
    before = contents(built)
    (tmp_path / "news.jsonl").write_text(
        '{"id": "a", "contents": "Fine."}\n{"id": "b", "contents": \n'
    )
    assert f"{tmp_path / 'news.jsonl'}:2: not valid JSON" in refused(
        index(f"--append={tmp_path / 'news.jsonl'}")
    )
    assert contents(built) == before


def test_a_folder_of_someone_else_is_left_alone(index, world, tmp_path):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "thesis.txt").write_text("years of work")
    assert "exists and holds files that were not saved by kafjax" in refused(
        index(f"--corpus={world.corpus}")
    )
    assert contents(tmp_path / "index") == {
        (tmp_path / "index" / "thesis.txt").relative_to(tmp_path / "index"): b"years of work"
    }


def test_nothing_to_search_in(index, tmp_path):
    assert "not a saved store" in refused(index("--query=bells"))
    assert not (tmp_path / "index").exists()
