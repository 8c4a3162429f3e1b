"""The retention suite: what weights find likely, and what comes back after a few examples."""

from __future__ import annotations

import dataclasses

import pytest

from kafjax.core.records import Question
from kafjax.evaluation.results import LIKELIEST, REALIGNED, RETENTION, Arm, summarise
from kafjax.methods import open_method, retention

COUNTRIES = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Norway": "Oslo"}


@pytest.fixture(scope="module")
def examined(make_lab):
    lab, _ = make_lab()
    asked = tuple(
        Question(f"capital-{i}", f"What is the capital of {name}?", (capital,), RETENTION)
        for i, (name, capital) in enumerate(COUNTRIES.items())
    )
    # the same questions to realign with: what comes back then is what they say
    replay = tuple(dataclasses.replace(q, split="replay") for q in asked) * 5
    corpus = dataclasses.replace(lab.corpus, retention=asked, replay_questions=replay)
    lab = dataclasses.replace(lab, corpus=corpus)
    found = {}
    for name in ("base", "rag"):
        method = open_method(lab, name)
        method.learn()
        found[name] = retention.examine(method, method.answer(method.questions()), 20), method
    return found


def test_weights_get_both_scores_on_retention_alone(examined):
    predictions, method = examined["base"]
    scored = [p for p in predictions if p.split == RETENTION]
    assert len(scored) == 4
    assert all({LIKELIEST, REALIGNED} <= p.score.keys() for p in scored)
    assert not any(LIKELIEST in p.score for p in predictions if p.split != RETENTION)
    likelihoods = method.weigh(method.lab.corpus.retention, [list(COUNTRIES.values())] * 4)
    for number, (p, nats) in enumerate(zip(scored, likelihoods, strict=True)):
        assert p.score[LIKELIEST] == (max(range(4), key=nats.__getitem__) == number)


def test_realignment_leaves_the_methods_weights_as_they_were(examined):
    predictions, method = examined["base"]
    again = method.answer(method.lab.corpus.retention)
    assert [p.answer for p in predictions if p.split == RETENTION] == [p.answer for p in again]


def test_a_reader_answers_under_retrieval_and_is_not_examined(examined):
    predictions, _ = examined["rag"]
    of_retention = [p for p in predictions if p.split == RETENTION]
    assert of_retention and all(p.passages and LIKELIEST not in p.score for p in of_retention)
    quality = summarise(Arm(examined["base"][0], examined["base"][1].cost()))
    assert quality["retention_capital"].n == quality["retention_capital_likeliest"].n == 4
    assert {"retention_likeliest", "retention_realigned"} <= quality.keys()
