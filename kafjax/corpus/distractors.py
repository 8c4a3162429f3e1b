"""Passages to put beside the one with the answer: near, random, or contradicting it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import regex

from kafjax.core.records import Passage, Question
from kafjax.corpus.facts import stream

NEAR, RANDOM, CONTRADICTING = "near", "random", "contradicting"
DISTRACTORS = (NEAR, RANDOM, CONTRADICTING)


def random_passages(
    question: Question, passages: Sequence[Passage], n: int, seed: int
) -> list[Passage]:
    """Draws `n` passages that do not answer the question, fewer where there are fewer."""
    gold = set(question.passages)
    others = [passage for passage in passages if passage.id not in gold]
    return stream(seed, question.id, "random").sample(others, min(n, len(others)))


def contradiction(
    question: Question, gold: Passage, questions: Sequence[Question], seed: int
) -> Passage | None:
    """Rewrites a passage so that it tells another answer: one that is right for a question of the
    same wording about another subject, or for any other where there is none.

    Returns None where the passage does not hold the answer word by word, or there is no other.
    """
    told = _found(gold.text, question.answers)
    if told is None:
        return None
    right = {answer.casefold() for answer in question.answers}
    wording = _wording(question)
    others: dict[bool, list[str]] = {True: [], False: []}
    for other in questions:
        if right.isdisjoint(answer.casefold() for answer in other.answers):
            others[_wording(other) == wording].append(other.answers[0])
    pool = list(dict.fromkeys(others[True] or others[False]))
    if not pool:
        return None
    wrong = stream(seed, question.id, "contradicting").choice(pool)
    text = gold.text[: told[0]] + wrong + gold.text[told[1] :]
    return dataclasses.replace(gold, id=f"{question.id}/{CONTRADICTING}", text=text, source=None)


def _found(text: str, answers: Sequence[str]) -> tuple[int, int] | None:
    """Returns the place of the first answer that stands in a text as whole words."""
    for answer in sorted(answers, key=len, reverse=True):
        if found := regex.search(
            rf"(?<!\w){regex.escape(answer)}(?!\w)", text, regex.IGNORECASE, timeout=5
        ):
            return found.span()
    return None


def _wording(question: Question) -> str:
    """Returns a question without whom it is about."""
    return question.text.replace(question.subject, "") if question.subject else question.text
