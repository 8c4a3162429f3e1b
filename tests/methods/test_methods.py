"""Methods beside their answers: which passages, whose weights, what is on the bill; and that a new
method is one class."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from experiments.comparison import run_arm
from kafjax import lora
from kafjax.core.errors import UserError
from kafjax.core.progress import unshown
from kafjax.core.records import Question
from kafjax.evaluation.results import collect
from kafjax.methods import METHODS, READERS, WEIGHTS, Method, in_running_order, open_method, parts
from kafjax.methods.rag import Reader
from kafjax.methods.trained import Trained
from kafjax.prompts import prompt


def asked(lab, split="untrained"):
    return [q for q in lab.corpus.questions if q.split == split]


def test_names_and_order():
    assert METHODS[:3] == ("base", "oracle", "rag")  # a first answer stands after the cheap ones
    assert in_running_order(list(reversed(METHODS))) == list(METHODS)
    mixed = in_running_order(["full+hyde", "dora+rag", "full", "rag", "dora", "base", "rag"])
    assert mixed == ["base", "rag", "dora", "full", "dora+rag", "full+hyde"]


def test_any_weights_go_with_any_reader():
    assert parts("lora") == ("lora", None) and parts("rag") == ("base", "rag")
    assert {parts(f"{w}+{r}") for w in WEIGHTS if w != "base" for r in READERS} == {
        (w, r) for w in WEIGHTS if w != "base" for r in READERS
    }
    for wrong in ("lorra", "rag+lora", "lora+", "+rag", "lora+rag+hyde", "base+rag", "base+", ""):
        with pytest.raises(UserError, match="unknown method"):
            parts(wrong)


def test_a_variant_of_lora_trains_apart_and_is_read_with(make_lab):
    lab, logged = make_lab(epochs=1)
    hybrid = open_method(lab, "dora+rag")
    hybrid.learn()
    assert {row["method"] for row in logged} == {"dora"}
    _, spec = lora.load(lab.folder / "dora" / "adapter.safetensors", lab.params)
    assert spec.dora and not open_method(lab, "lora").is_trained
    assert hybrid.weights.note.startswith("dora adapter of rank 4")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_hybrid_reads_with_the_weights_that_the_plain_method_trained(make_lab, kind):
    lab, logged = make_lab(epochs=1)
    plain, hybrid = open_method(lab, kind), open_method(lab, f"{kind}+rag")
    assert not plain.is_trained and not hybrid.is_trained
    plain.learn()
    steps = len(logged)
    assert steps > 0 and hybrid.is_trained
    hybrid.learn()
    assert len(logged) == steps
    same = jax.tree.map(lambda a, b: bool((a == b).all()), plain.params, hybrid.params)
    assert all(jax.tree.leaves(same))
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), plain.params, lab.params)
    assert any(jax.tree.leaves(changed))


def test_a_hybrid_alone_trains_what_it_needs(make_lab):
    lab, logged = make_lab(epochs=1)
    open_method(lab, "lora+rag").learn()
    assert {row["method"] for row in logged} == {"lora"}
    assert open_method(lab, "lora").is_trained


def test_answers_before_learning_are_refused(make_lab):
    lab, _ = make_lab()
    with pytest.raises(RuntimeError, match="has not learned yet"):
        open_method(lab, "lora").answer(asked(lab))


def test_oracle_reads_the_gold_passage_that_retrieval_ranks_first_and_nothing_else(make_lab):
    lab, _ = make_lab(k=4)
    oracle, rag = open_method(lab, "oracle"), open_method(lab, "rag")
    rag.learn()
    two = [dataclasses.replace(q, passages=("doc5#0", *q.passages)) for q in asked(lab)]
    ranked = rag.answer(two)
    assert any("doc5#0" not in p.passages for p in ranked)
    for question, found, prediction in zip(two, ranked, oracle.answer(two), strict=True):
        gold = [id for id in found.passages if id in question.passages] or ["doc5#0"]
        assert prediction.passages == (gold[0],)
        assert prediction.cached_tokens == found.cached_tokens  # behind the same examples


def test_oracle_and_rag_agree_when_retrieval_finds_only_the_gold_passage(make_lab):
    lab, _ = make_lab(k=1)
    rag = open_method(lab, "rag")
    rag.learn()
    found = [p for p in rag.answer(asked(lab)) if p.passages == p.gold_passages]
    assert found
    by_id = {p.id: p for p in open_method(lab, "oracle").answer(asked(lab))}
    for p in found:
        assert (p.answer, p.prompt_tokens, p.output_tokens) == (
            by_id[p.id].answer,
            by_id[p.id].prompt_tokens,
            by_id[p.id].output_tokens,
        )


def test_hyde_is_two_calls_and_both_are_on_the_bill(lab):
    hyde = open_method(lab, "hyde")
    hyde.learn()
    questions = asked(lab)
    generator = lab.generator
    guesses = hyde.calls(questions)
    predictions = hyde.answer(questions)
    texts = {passage.id: passage.text for passage in lab.corpus.passages}
    for question, (guess,), p in zip(questions, guesses, predictions, strict=True):
        assert p.calls == 2
        # 1 is BOS
        first = (
            1 + generator.count(prompt.hyde_prefix()),
            generator.count(prompt.hyde(question.text)),
        )
        reading = prompt.reading(question.text, [texts[id] for id in p.passages])
        second = 1 + generator.count(prompt.reading_prefix(2)), generator.count(reading)
        assert p.prompt_tokens == sum(first) + sum(second)
        assert p.cached_tokens == first[0] + second[0]
        assert (
            guess.output_tokens
            < p.output_tokens
            <= guess.output_tokens + lab.settings.generation.max_new_tokens
        )
        assert p.seconds.keys() == {"embed", "search", "prefill", "decode"}


def test_hyde_searches_with_the_mean_of_question_and_guess(lab):
    hyde = open_method(lab, "hyde")
    questions = asked(lab)
    guesses = [call.text for (call,) in hyde.calls(questions)]
    hits = hyde.find(questions, 50).hits
    question_QxD, guess_QxD = (
        lab.embedder.embed([q.text for q in questions]),
        lab.embedder.embed(guesses),
    )
    bisector_QxD = (question_QxD + guess_QxD) / np.linalg.norm(
        question_QxD + guess_QxD, axis=1, keepdims=True
    )
    for vector_D, found in zip(bisector_QxD, hits, strict=True):
        passages_NxD = lab.embedder.embed([hit.passage.text for hit in found])
        np.testing.assert_allclose([hit.score for hit in found], passages_NxD @ vector_D, atol=1e-5)
        assert len(found) == len(lab.store)


def test_rewrite_searches_with_the_query_that_it_wrote_and_with_the_question_where_it_wrote_none(
    lab, monkeypatch
):
    rewrite = open_method(lab, "rewrite")
    questions = asked(lab)
    calls = rewrite.calls(questions)
    assert {p.calls for p in rewrite.answer(questions)} == {2}
    silent = [[dataclasses.replace(call, text=" ")] for (call,) in calls]
    for written in (calls, silent):
        monkeypatch.setattr(rewrite, "calls", lambda _, written=written: written)
        texts = [
            call.text.strip() or question.text
            for question, (call,) in zip(questions, written, strict=True)
        ]
        assert rewrite.find(questions, 3).hits == lab.retriever.search(texts, 3)


@pytest.mark.parametrize("retriever", ["lexical", "hybrid"])
def test_rag_reads_what_any_retriever_finds(make_lab, retriever):
    lab, _ = make_lab(retriever=retriever)
    for name in ("rag", "hyde"):
        method = open_method(lab, name)
        method.check()
        method.learn()
        hits = method.find(asked(lab), 2).hits
        predictions = method.answer(asked(lab))
        assert [p.passages for p in predictions] == [
            tuple(hit.passage.id for hit in found) for found in hits
        ]
        assert all("search" in p.seconds for p in predictions) and "BM25" in method.note
    assert ("embedder" in vars(lab)) == (retriever == "hybrid")  # words need no encoder
    assert (method.cost().index_flops_formula > 0) == (retriever == "hybrid")


def test_the_bill_of_rag_over_trained_weights_is_the_sum(make_lab):
    lab, _ = make_lab(epochs=1)
    bills = {}
    for name in ("lora", "rag", "lora+rag"):
        method = open_method(lab, name)
        method.learn()
        bills[name] = method.cost()
    both = bills["lora+rag"]
    assert both.artifact_bytes == bills["lora"].artifact_bytes + bills["rag"].artifact_bytes
    assert (both.train_seconds, both.train_tokens) == (
        bills["lora"].train_seconds,
        bills["lora"].train_tokens,
    )
    assert both.index_seconds == bills["rag"].index_seconds > 0
    assert bills["rag"].trainable_parameters == 0 < both.trainable_parameters


def test_the_index_is_built_once_and_found_again(make_lab):
    lab, _ = make_lab()
    open_method(lab, "rag").learn()
    stamps = {path: path.stat().st_mtime_ns for path in lab.folder.rglob("*")}
    again = dataclasses.replace(lab)  # as in a later process: nothing is remembered but the folder
    open_method(again, "hyde").learn()
    assert {path: path.stat().st_mtime_ns for path in lab.folder.rglob("*")} == stamps
    query_1xD = lab.embedder.embed(["Who makes maps?"])
    assert again.store.search(query_1xD, 3) == lab.store.search(query_1xD, 3)


def test_adopt_answers_with_what_another_training_left(make_lab):
    elsewhere, _ = make_lab(epochs=1)
    trained = open_method(elsewhere, "lora")
    trained.learn()
    lab, logged = make_lab()
    hybrid = open_method(lab, "lora+rag")
    assert isinstance(hybrid.weights, Trained)
    hybrid.weights.adopt(trained.folder)
    assert hybrid.is_trained
    hybrid.learn()
    assert not logged
    assert all(
        jax.tree.leaves(
            jax.tree.map(lambda a, b: bool((a == b).all()), hybrid.params, trained.params)
        )
    )


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("lora", {"rank": 999}, "rank=999 is above min"),
        ("lora+rag", {"targets": "nothing"}, "match no kernel"),
    ],
)
def test_check_finds_what_learning_would_only_find_later(make_lab, name, settings, expected):
    lab, _ = make_lab(**settings)
    with pytest.raises(UserError, match=expected):
        open_method(lab, name).check()


def test_a_question_without_a_known_answer_is_answered_but_not_scored(lab):
    (prediction,) = open_method(lab, "base").answer(
        [Question(id="", text="Who keeps bees?", answers=(), split="")]
    )
    assert prediction.output_tokens > 0 and prediction.score == {}


class FirstNamed(Reader):
    """A method of one's own: reads the passage that names the person asked about, found by its
    words."""

    note = "the passage that shares most words with the question"

    def answer(self, questions, advance=unshown):
        def shared(passage, question):
            return len(set(passage.text.split()) & set(question.text.split()))

        found = [
            [max(self.lab.corpus.passages, key=lambda p: shared(p, question))]
            for question in questions
        ]
        return self.read(questions, found, 1, advance=advance)


class Parrot(Method):
    """A method of one's own from nothing but the protocol: repeats the last word of the
    question."""

    def answer(self, questions, advance=unshown):
        replies = self.generate(
            prompt.closed_book_prefix(), [prompt.closed_book(q.text) for q in questions], 1, advance
        )
        last_words = [q.text.rstrip("?").split()[-1] for q in questions]
        said = [
            dataclasses.replace(reply, text=word)
            for reply, word in zip(replies, last_words, strict=True)
        ]
        return [
            self.prediction(question, [reply])
            for question, reply in zip(questions, said, strict=True)
        ]


def test_a_new_method_runs_through_the_comparison(lab, monkeypatch):
    monkeypatch.setitem(READERS, "words", FirstNamed)
    monkeypatch.setitem(WEIGHTS, "parrot", Parrot)
    arms = {name: run_arm(lab, name, 1, None) for name in ("base", "words", "parrot")}
    results = collect(arms, config={}, environment={})
    assert list(results["methods"]) == ["base", "words", "parrot"]
    assert results["methods"]["words"]["quality"]["recall_at_k"]["value"] == 1
    assert {p.answer for p in arms["parrot"].predictions if p.split == "seen"} == {"born"}
    assert results["methods"]["parrot"]["cost"]["llm_calls_per_query"] == 1
