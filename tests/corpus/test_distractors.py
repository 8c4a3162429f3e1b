"""Passages beside the one with the answer."""

from __future__ import annotations

import pytest

from kafjax.core.records import Passage, Question
from kafjax.corpus import biographies
from kafjax.corpus.distractors import contradiction, random_passages
from kafjax.corpus.people import POOLS

CORPUS = biographies(8, 3, seed=1)
BY_ID = {passage.id: passage for passage in CORPUS.passages}


@pytest.mark.parametrize("question", CORPUS.questions[::5], ids=lambda question: question.id)
def test_a_contradiction_is_the_passage_with_another_value_of_its_kind(question):
    gold = BY_ID[question.passages[0]]
    made = contradiction(question, gold, CORPUS.questions, 0)
    assert made == contradiction(question, gold, CORPUS.questions, 0) and made is not None
    before, after = gold.text.split(question.answers[0])
    wrong = made.text.removeprefix(before).removesuffix(after)
    assert made.text == before + wrong + after
    attribute = question.id.split("/")[1]
    assert wrong != question.answers[0] and wrong in POOLS[attribute]
    assert made.id not in BY_ID


def test_random_passages_answer_nothing_and_are_drawn_for_each_question():
    drawn = []
    for question in CORPUS.questions:
        found = random_passages(question, CORPUS.passages, 4, 0)
        assert len({p.id for p in found}) == 4 and not {p.id for p in found} & {*question.passages}
        assert found == random_passages(question, CORPUS.passages, 4, 0)
        drawn.append(tuple(p.id for p in found))
    assert len(set(drawn)) > len(drawn) / 2
    assert len(random_passages(CORPUS.questions[0], CORPUS.passages[:2], 9, 0)) <= 2


@pytest.mark.parametrize(
    ("text", "answers", "others"),
    [
        ("Mira lives in Romeo.", ("Rome",), ("Lyon",)),  # not as a whole word
        ("Mira lives in Rome.", ("Rome",), ("ROME", "rome")),  # no other answer
        ("Mira lives there.", ("Rome",), ("Lyon",)),
    ],
)
def test_what_cannot_be_contradicted_is_not(text, answers, others):
    asked = [Question(str(i), f"{i}?", (other,), "") for i, other in enumerate(others)]
    question = Question("q", "Where?", answers, "", ("p",))
    assert contradiction(question, Passage("p", text), asked, 0) is None


def test_an_answer_is_replaced_whatever_its_case_and_signs():
    question = Question("q", "What?", ("c++ (lang)", "C++"), "", ("p",))
    other = Question("r", "How?", ("Rust",), "")
    made = contradiction(question, Passage("p", "It is C++ (Lang), he said."), [other], 0)
    assert made is not None and made.text == "It is Rust, he said."
