"""Worked examples do not answer what they are asked beside."""

from __future__ import annotations

import itertools

import pytest

from kafjax.core.records import Question
from kafjax.corpus import load
from kafjax.evaluation.score import answers_in, contains
from kafjax.prompts.prompt import SHOTS, Plain
from kafjax.prompts.shots import ALTERNATIVES, choose


def asked(*answers: str) -> list[Question]:
    return [Question(str(i), "?", (answer,), "untrained") for i, answer in enumerate(answers)]


@pytest.mark.parametrize("answer", ["1931", "goat", "history", "Ilse Brandt", "Norway"])
def test_an_example_that_holds_an_answer_is_left_out(answer):
    chosen = choose(asked(answer))
    plain = Plain(chosen)
    for prefix in (
        plain.closed_book_prefix(),
        plain.reading_prefix(3),
        plain.hyde_prefix(),
        plain.rewrite_prefix(),
    ):
        assert not answers_in(prefix, [answer])
    assert sum(a != b for a, b in zip(chosen, SHOTS, strict=True)) == 1


def test_no_alternative_holds_the_answer_of_another_of_its_place():
    for alternatives in ALTERNATIVES:
        for a, b in itertools.permutations(alternatives, 2):
            assert not contains(a.text.replace("\n", " "), [b.answer])


def test_corpora_at_their_default_size_are_asked_behind_the_same_examples():
    for name in ("biographies", "factbook"):
        corpus = load(name, n_retention=70)
        assert (
            choose(
                [
                    *corpus.questions,
                    *corpus.training_questions,
                    *corpus.retention,
                    *corpus.replay_questions,
                ]
            )
            == SHOTS
        )


def test_where_every_example_holds_an_answer_it_is_told(caplog):
    assert choose(asked("1931", "1874", "1786"))[2] in ALTERNATIVES[2]
    assert "holds accepted answers of the corpus: '1931'" in caplog.text
