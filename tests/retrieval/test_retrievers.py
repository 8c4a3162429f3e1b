"""Behaviour that every kind of retriever shares, over one store on disk; and what each does by
itself."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest

from kafjax import hub
from kafjax.core.errors import UserError
from kafjax.core.records import Passage
from kafjax.core.stopwatch import stage, stages
from kafjax.retrieval import (
    KINDS,
    Dense,
    Embedder,
    Hit,
    Lexical,
    Store,
    build_store,
    fuse,
    open_retriever,
)
from kafjax.retrieval.hybrid import weigh
from kafjax.retrieval.lexical import words
from tests import tiny

PASSAGES = [Passage(row["id"], row["contents"], document=row["id"]) for row in tiny.documents()]
ASKED = ["Where was Mira Toll born?", "Who makes maps?"]


@pytest.fixture(scope="module")
def embedder(tmp_path_factory) -> Embedder:
    folder = str(tiny.write_bert(tmp_path_factory.mktemp("bert") / "bert"))
    return Embedder(*hub.load(folder), hub.tokenizer(folder))


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def opened(kind, embedder):
    """`opened(store)`: the retriever over it."""
    return lambda store: open_retriever(store, kind, lambda: embedder)


@pytest.fixture
def store(kind, embedder) -> Store:
    return build_store(PASSAGES, kind, "exact", lambda: embedder)


def ids(found: list[list[Hit]]) -> list[list[str]]:
    return [[hit.passage.id for hit in hits] for hits in found]


def test_hits_are_passages_with_falling_scores(opened, store):
    found = opened(store).search(ASKED, 3)
    assert len(found) == 2 and all(1 <= len(hits) <= 3 for hits in found)
    for hits in found:
        assert all(
            isinstance(hit.passage, Passage)
            and isinstance(hit.score, float)
            and isinstance(hit.passage.id, str)
            for hit in hits
        )
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert opened(store).search([], 3) == []


def test_a_passage_finds_itself(opened, store):
    assert ids(opened(store).search([p.text for p in PASSAGES], 1)) == [[p.id] for p in PASSAGES]


def test_saved_and_loaded_it_finds_the_same(opened, store, tmp_path):
    before = opened(store).search(ASKED, 4)
    store.save(tmp_path / "store")
    assert opened(Store.load(tmp_path / "store")).search(ASKED, 4) == before


def test_it_grows_and_shrinks_as_if_built_anew(opened, store, kind, embedder):
    retriever = opened(store)
    retriever.search(ASKED, 1)
    new = [Passage("new", "Ada Quill makes maps and paints bells.")]
    store.append(new, embedder.embed_documents([new[0].text]) if store.index is not None else None)
    store.delete(["doc0", "doc4"])
    kept = [p for p in [*PASSAGES, *new] if p.id not in ("doc0", "doc4")]
    anew = build_store(kept, kind, "exact", lambda: embedder)
    assert set(store.ids) == {p.id for p in kept}
    found, expected = retriever.search(ASKED, 9), opened(anew).search(ASKED, 9)
    assert ids(found) == ids(expected)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            [hit.score for hit in ours], [hit.score for hit in theirs], rtol=1e-6
        )


def test_a_guess_leads_to_the_passage_that_it_names(opened, store):
    asked = ["What does she make?"]
    assert ids(opened(store).search(asked, 1, [PASSAGES[3].text])) == [[PASSAGES[3].id]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("one string", 1), "expected a list of texts"),
        (([7], 1), "expected texts to search for, got 7"),
        ((["a"], 0), "k=0"),
        ((["a"], 1, ["b", "c"]), "2 hypothetical passages for 1 texts"),
    ],
)
def test_bad_queries_are_refused_in_one_line(opened, store, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        opened(store).search(*arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("passages", "message"),
    [
        ([Passage(7, "x")], "ids must be strings, got 7"),
        ([Passage("a", "x"), Passage("a", "y")], "'a' is given twice"),
        ([Passage("a", "x"), Passage("b", " \n")], "passage 'b' is empty; leave it out"),
    ],
)
def test_ids_are_unique_strings_and_texts_are_not_empty(kind, embedder, passages, message):
    with pytest.raises(UserError, match=message):
        build_store(passages, kind, "exact", lambda: embedder)


def test_nothing_is_found_among_nothing(opened, kind, embedder):
    assert opened(build_store([], kind, "exact", lambda: embedder)).search(ASKED, 3) == [[], []]


def test_a_dense_store_serves_every_kind_and_a_lexical_one_itself(embedder, tmp_path):
    store = build_store(PASSAGES, "dense", "exact", lambda: embedder)
    for kind in KINDS:
        assert len(open_retriever(store, kind, lambda: embedder).search(ASKED, 2)[0]) == 2
    build_store(PASSAGES, "lexical", "exact", lambda: embedder).save(tmp_path / "lexical")
    assert not list((tmp_path / "lexical").rglob("*vectors*"))
    loaded = Store.load(tmp_path / "lexical")
    for kind in ("dense", "hybrid"):
        with pytest.raises(UserError, match=f"--retriever={kind} needs vectors"):
            open_retriever(loaded, kind, lambda: embedder)
    with pytest.raises(UserError, match="passages need vectors where"):
        loaded.append([Passage("x", "y")], np.ones((1, 4)))
    with pytest.raises(UserError, match=r"unknown retriever 'lexcal'\. Did you mean 'lexical'"):
        open_retriever(loaded, "lexcal", lambda: embedder)


def test_bm25_is_the_formula():
    texts = ["red red fish", "blue fish", "a bird, and a red bird", "...", "wholly unlike"]
    store = Store(None, [Passage(str(i), text) for i, text in enumerate(texts)])
    (hits,) = Lexical(store).search(["Red fish!"], 10)
    tokens = [words(text) for text in texts]
    average = sum(map(len, tokens)) / len(tokens)

    def score(document: list[str]) -> float:
        total = 0.0
        for word in ("red", "fish"):
            n, frequency = sum(word in other for other in tokens), document.count(word)
            idf = math.log(1 + (len(tokens) - n + 0.5) / (n + 0.5))
            total += (
                idf * frequency / (frequency + 1.5 * (1 - 0.75 + 0.75 * len(document) / average))
            )
        return total

    expected = sorted(
        ((score(document), -i) for i, document in enumerate(tokens) if score(document) > 0),
        reverse=True,
    )
    assert [hit.passage.id for hit in hits] == [str(-i) for _, i in expected]
    np.testing.assert_allclose([hit.score for hit in hits], [s for s, _ in expected], rtol=1e-5)


@pytest.mark.parametrize("kind", ["lexical", "hybrid"])
def test_a_missing_package_is_named_before_anything_is_built(kind, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="BM25 needs the package bm25s"):
        build_store(PASSAGES, kind, "exact", pytest.fail)


def test_words_that_no_passage_holds_find_nothing_and_ties_keep_their_order():
    store = Store(None, [Passage(id, "the same words") for id in "dacb"])
    (nothing, tied) = Lexical(store).search(["unheard", "same"], 3)
    assert nothing == [] and [hit.passage.id for hit in tied] == ["d", "a", "c"]


@pytest.mark.parametrize(
    ("asked", "id"),
    [
        ("谁在塔里画地图", "maps"),
        ("铃铛", "bells"),
        ("ใครวาดแผนที่", "thai"),
        ("नक्शे", "hindi"),
        ("МАСТЕРСКАЯ", "russian"),
    ],
)
def test_passages_of_any_script_are_found_by_their_words(asked, id):
    texts = {
        "maps": "米拉·托尔在山上的塔里画地图。",
        "bells": "阿达给铃铛上色、住在河边。",
        "thai": "ช่างวาดแผนที่อยู่ในหอคอย",
        "hindi": "वह नक्शे बनाती है",
        "russian": "Мастерская стоит",
    }
    (hits,) = Lexical(Store(None, [Passage(id, text) for id, text in texts.items()])).search(
        [asked], 5
    )
    assert hits[0].passage.id == id


def test_a_word_keeps_its_marks_and_ends_at_punctuation():
    assert words("नक्शे, Café-Bar (maps)") == ["नक्शे", "café", "bar", "maps"]


def test_ranks_are_fused_as_in_the_paper():
    a, b, c, d = (Hit(Passage(id, id), 9.0) for id in "abcd")
    fused = fuse([[a, b, c], [c, a, d]])
    expected = {"a": 1 / 61 + 1 / 62, "c": 1 / 63 + 1 / 61, "b": 1 / 62, "d": 1 / 63}
    assert [(hit.passage.id, hit.score) for hit in fused] == list(expected.items())


def test_weighted_scores_are_stretched_before_they_add_up():
    a, b, c, d = (Passage(id, id) for id in "abcd")
    rankings = [Hit(a, 10.0), Hit(b, 4.0), Hit(c, 2.0)], [Hit(d, -1.0), Hit(b, -3.0)]
    fused = weigh(rankings, [0.75, 0.25])
    assert [(hit.passage.id, hit.score) for hit in fused] == [
        ("a", 0.75),
        ("d", 0.25),
        ("b", 0.75 * 0.25),
        ("c", 0.0),
    ]
    assert [hit.score for hit in weigh([[Hit(a, 7.0)], []], [0.5, 0.5])] == [0.5]


def test_a_hybrid_of_one_weight_ranks_as_that_retriever_does(embedder):
    store = build_store(PASSAGES, "dense", "exact", lambda: embedder)

    def found(kind, weight=None):
        retriever = open_retriever(store, kind, lambda: embedder, dense_weight=weight)
        return ids(retriever.search(ASKED, 1))

    assert found("hybrid", 1.0) == found("dense")
    assert found("hybrid", 0.0) == found("lexical")


def test_seconds_of_stages_add_up(embedder):
    dense = Dense(build_store(PASSAGES, "dense", "exact", lambda: embedder), embedder)
    with stages() as seconds:
        dense.search(ASKED, 1)
        first = dict(seconds)
        dense.search(ASKED, 1)
    assert first.keys() == {"embed", "search"} and all(
        seconds[name] > first[name] > 0 for name in first
    )
    with stage("embed"):  # nobody asks
        pass
    assert seconds.keys() == first.keys()
