"""Worked examples, chosen so that none of them holds an answer to a question of the corpus.

A small model copies from its examples when it knows nothing: an example that says 1931 answers
every question about that year.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from absl import logging

from kafjax.core.records import Question
from kafjax.core.text import shortened
from kafjax.evaluation.score import answers_in


@dataclasses.dataclass(frozen=True)
class Shot:
    """A worked example. `passages` are best first, as retrieval gives them; only the first one
    answers."""

    question: str
    answer: str
    passages: tuple[str, ...]

    @property
    def text(self) -> str:
        """All that it says, a line each."""
        return "\n".join((self.question, self.answer, *self.passages))


# Invented matters with short answers: nothing here is asked by a corpus that ships at its default
# size, and nothing can be answered from memory. The alternatives of a place have an answer of the
# same kind, in other words.
ALTERNATIVES = (
    (
        Shot(
            "What subject does Tomas Berg teach?",
            "chemistry",
            (
                "Tomas Berg teaches chemistry at a school in Uppsala.",
                "Tomas Berg spends his summers in Norway.",
                "Lena Falk teaches history.",
            ),
        ),
        Shot(
            "What instrument does Pavel Rusk play?",
            "cello",
            (
                "Pavel Rusk plays the cello in a trio.",
                "Pavel Rusk keeps bees.",
                "Dora Finch plays the flute.",
            ),
        ),
        Shot(
            "What does Anja Moll collect?",
            "stamps",
            (
                "Anja Moll collects stamps with ships on them.",
                "Anja Moll drinks no tea.",
                "Jonas Reed collects old maps.",
            ),
        ),
    ),
    (
        Shot(
            "What is the occupation of Ilse Brandt?",
            "baker",
            (
                "Ilse Brandt has been a baker since 2009.",
                "Ilse Brandt lives by the sea.",
                "Karl Weber used to drive a bus.",
            ),
        ),
        Shot(
            "What is the occupation of Joren Pike?",
            "roofer",
            (
                "Joren Pike has been a roofer for ten winters.",
                "Joren Pike owns two dogs.",
                "Mina Dahl used to mend clocks.",
            ),
        ),
        Shot(
            "What is the trade of Sanna Krol?",
            "glazier",
            (
                "Sanna Krol works as a glazier.",
                "Sanna Krol sings on Sundays.",
                "Peer Olm used to sell fish.",
            ),
        ),
    ),
    (
        Shot(
            "When was the bridge over the Elm opened?",
            "1931",
            (
                "The bridge over the Elm was opened in 1931.",
                "The Elm is a short river in the north.",
                "The mill by the bridge closed in 1960.",
            ),
        ),
        Shot(
            "When was the lighthouse of Varn lit?",
            "1874",
            (
                "The lighthouse of Varn was lit in 1874.",
                "Varn has a stony beach.",
                "The pier beside the lighthouse fell in 1903.",
            ),
        ),
        Shot(
            "When did the museum of Holt close?",
            "1786",
            (
                "The museum of Holt closed in 1786.",
                "Holt lies behind a hill.",
                "The tower next to the museum burned down in 1812.",
            ),
        ),
    ),
    (
        Shot(
            "Who pays the wages of Otto Lind?",
            "Harrow Paints",
            (
                "The wages of Otto Lind are paid by Harrow Paints.",
                "Otto Lind likes to swim.",
                "Greta Moss left Dunmore Steel.",
            ),
        ),
        Shot(
            "Who pays the wages of Ruben Vale?",
            "Corbel Textiles",
            (
                "The wages of Ruben Vale are paid by Corbel Textiles.",
                "Ruben Vale rides a red bicycle.",
                "Edda Lorn left Quill Bricks.",
            ),
        ),
        Shot(
            "Who employs Ida Thorn?",
            "Lowe Ceramics",
            (
                "Ida Thorn is employed by Lowe Ceramics.",
                "Ida Thorn rises early.",
                "Nils Garde left Osier Baskets.",
            ),
        ),
    ),
)


def choose(questions: Iterable[Question]) -> tuple[Shot, ...]:
    """Chooses an example for each place: the first one of its alternatives that holds no accepted
    answer of the questions.

    Where each of them holds one, the one with the fewest is taken, and told.
    """
    answers = list(dict.fromkeys(answer for question in questions for answer in question.answers))
    chosen = []
    for alternatives in ALTERNATIVES:
        held: dict[Shot, list[str]] = {}
        for shot in alternatives:
            held[shot] = answers_in(shot.text, answers)
            if not held[shot]:
                break
        best = min(held, key=lambda shot: len(held[shot]))
        if held[best]:
            shown = ", ".join(repr(shortened(answer, 30, str)) for answer in held[best][:3])
            logging.warning(
                "the worked example '%s' holds accepted answers of the corpus: %s",
                best.question,
                shown,
            )
        chosen.append(best)
    return tuple(chosen)
