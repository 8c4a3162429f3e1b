"""Weights that learn to read: what they are trained on, and that any reader goes with them."""

from __future__ import annotations

import dataclasses

import pytest

from kafjax.core.errors import UserError
from kafjax.methods import open_method
from kafjax.methods.reading import UNKNOWN


def texts(method) -> list[list[str]]:
    """The examples of each list, as text: (prompt and reply)."""
    decode = method.lab.tokenizer.decode
    return [[decode(list(e.tokens)).strip() for e in part] for part in method.examples()]


def prompts_of(lab, text: str) -> tuple[list[str], str, str]:
    """Splits an example into its passages, question and reply."""
    *passages, asked, reply = text.splitlines()
    return [p.removeprefix("Passage: ") for p in passages], asked, reply.removeprefix("Answer: ")


@pytest.fixture(scope="module")
def corpus_texts(lab):
    return {passage.text: passage.id for passage in lab.corpus.passages}


def test_a_reader_learns_each_training_question_behind_the_passage_that_answers_it(
    lab, corpus_texts
):
    (examples,) = texts(open_method(lab, "reader"))
    questions = lab.corpus.training_questions
    assert len(examples) == len(questions)
    for text, question in zip(examples, questions, strict=True):
        passages, asked, reply = prompts_of(lab, text)
        assert [corpus_texts[p] for p in passages] == [question.passages[0]]
        assert asked == f"Question: {question.text}" and reply == question.answers[0]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("abstains", [True, False])
def test_raft_sees_k_passages_and_the_right_one_as_often_as_it_is_told(
    make_lab, corpus_texts, share, abstains
):
    lab, _ = make_lab(raft_gold=share, raft_abstains=abstains, k=3)
    lab = dataclasses.replace(lab, settings=dataclasses.replace(lab.settings, document_parts=8))
    parts, with_gold, places = texts(open_method(lab, "raft")), [], set()
    assert len(parts) == 8 and len({tuple(part) for part in parts}) > (1 if share else 0)
    for part in parts:
        for text, question in zip(part, lab.corpus.training_questions, strict=True):
            passages, _, reply = prompts_of(lab, text)
            ids = [corpus_texts[p] for p in passages]
            assert len(set(ids)) == 3
            right = set(ids) & set(question.passages)
            with_gold.append(bool(right))
            places |= {ids.index(id) for id in right}
            assert reply == (question.answers[0] if right or not abstains else UNKNOWN)
    assert abs(sum(with_gold) / len(with_gold) - share) < 0.2
    assert places == (set(range(3)) if share else set())


def test_it_trains_on_no_document_and_reads_for_any_reader(make_lab):
    lab, logged = make_lab(epochs=1, steps=2)
    hybrid = open_method(lab, "raft+rag")
    hybrid.check()
    hybrid.learn()
    assert {row["method"] for row in logged} == {"raft"} and hybrid.params is not lab.params
    (prediction,) = hybrid.answer(lab.corpus.questions[:1])
    assert prediction.method == "raft+rag" and len(prediction.passages) == 2
    assert (lab.folder / "raft" / "adapter.safetensors").exists()
    assert "reads" in hybrid.note or "read" in open_method(lab, "reader").note


def test_a_corpus_without_training_questions_that_name_passages_is_refused(lab):
    questions = [dataclasses.replace(q, passages=()) for q in lab.corpus.training_questions]
    for kept in ([], questions):
        corpus = dataclasses.replace(lab.corpus, training_questions=tuple(kept))
        with pytest.raises(UserError, match="raft learns to read from training questions"):
            open_method(dataclasses.replace(lab, corpus=corpus), "raft+rag").check()
