"""The corpus of queries: an answer follows from the question, and no table is both trained and
asked."""

from __future__ import annotations

import pytest

from kafjax.core.errors import UserError
from kafjax.corpus.queries import MOST_TABLES, queries


def test_every_name_of_an_answer_stands_in_its_question():
    words = {"get", "from", "where", "count", "largest", "by", "is", "over", "under"}
    for question in queries(80, 6).questions:
        said = set(
            question.text.replace(",", " ")
            .replace(".", " ")
            .replace("?", " ")
            .replace(":", " ")
            .split()
        )
        assert set(question.answers[0].split()) - words <= said, question


def test_no_table_is_both_trained_and_asked():
    corpus = queries(100, 6)
    trained = {question.subject for question in corpus.training_questions}
    asked = {question.subject for question in corpus.questions}
    assert len(trained) == len(asked) == 50 and not trained & asked


def test_more_tables_change_none_of_those_before():
    assert set(queries(40, 4, seed=3).questions) <= set(queries(80, 6, seed=3).questions)
    assert queries(4, 4, seed=1).questions != queries(4, 4, seed=2).questions


@pytest.mark.parametrize("tables, questions", [(1, 4), (MOST_TABLES + 1, 4), (8, 0), (8, 7)])
def test_counts_out_of_range_are_named(tables, questions):
    with pytest.raises(UserError, match="must be"):
        queries(tables, questions)
