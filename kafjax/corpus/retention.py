"""Questions on other matters, which measure forgetting: three relations of countries that a small
model knows some of.

Each country is asked about once, so that as many countries as questions are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

from kafjax.core.records import RELATIONS, Question, relation_of
from kafjax.corpus.factbook import Country, capital_halves

WORDINGS = dict(
    zip(
        RELATIONS,
        (
            "What is the capital of {}?",
            "What is the currency of {}?",
            "On which continent is {}?",
        ),
        strict=True,
    )
)
ALTERNATIVES = 3
"""Wrong answers that the right one is weighed against."""


def world_questions(n: int) -> tuple[tuple[Question, ...], tuple[Question, ...]]:
    """Asks about the `2 n` most famous countries: (`n` of split `retention`, `n` of split
    `replay`).

    Each is asked for the relation that was asked least before, of those that the World Factbook
    has a plain answer for; all have a capital. Raises `UserError` as `capital_halves` does.
    """
    retention, replay = capital_halves(n)
    return _ask(retention, "retention"), _ask(replay, "replay")


def _ask(countries: Sequence[Country], split: str) -> tuple[Question, ...]:
    questions = []
    asked = dict.fromkeys(RELATIONS, 0)
    for country in countries:
        relation = min((name for name in RELATIONS if country.known[name]), key=asked.__getitem__)
        asked[relation] += 1
        questions.append(
            Question(
                id=f"{relation}-{country.code}",
                text=WORDINGS[relation].format(country.name),
                answers=country.known[relation],
                split=split,
                subject=country.name,
            )
        )
    return tuple(questions)


def alternatives(questions: Sequence[Question]) -> dict[str, tuple[str, ...]]:
    """Chooses the answers that each question's own is weighed against, by its id: the next
    different ones of the same relation. Questions without so many are left out."""
    found = {}
    for relation in RELATIONS:
        of_relation = [q for q in questions if relation_of(q.id) == relation]
        for place, question in enumerate(of_relation):
            others = dict.fromkeys(
                other.answers[0]
                for other in of_relation[place + 1 :] + of_relation[:place]
                if other.answers[0] not in question.answers
            )
            if len(others) >= ALTERNATIVES:
                found[question.id] = tuple(others)[:ALTERNATIVES]
    return found
