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
    answers. `query` is how one would search for it."""

    question: str
    answer: str
    query: str
    passages: tuple[str, ...]

    @property
    def text(self) -> str:
        """All that it says, a line each."""
        return "\n".join((self.question, self.answer, self.query, *self.passages))


# Invented matters with short answers: no attribute of a corpus that ships is asked here, so that no
# example shows a question's own form, and nothing can be answered from memory. The alternatives of a place have an answer of the
# same kind, in other words.
ALTERNATIVES = (
    (
        Shot(
            "What subject does Tomas Berg teach?",
            "chemistry",
            "Tomas Berg teacher subject",
            (
                "Tomas Berg teaches chemistry at a school in Uppsala.",
                "Tomas Berg spends his summers in Norway.",
                "Lena Falk teaches history.",
            ),
        ),
        Shot(
            "What subject does Pavel Rusk paint?",
            "windmills",
            "Pavel Rusk painter motif",
            (
                "Pavel Rusk paints windmills in oil.",
                "Pavel Rusk keeps bees.",
                "Dora Finch paints horses.",
            ),
        ),
        Shot(
            "What does Anja Moll collect?",
            "stamps",
            "Anja Moll collector of",
            (
                "Anja Moll collects stamps with ships on them.",
                "Anja Moll drinks no tea.",
                "Jonas Reed collects old maps.",
            ),
        ),
    ),
    (
        Shot(
            "What animal does Ilse Brandt keep?",
            "goat",
            "Ilse Brandt animal kept",
            (
                "Ilse Brandt has kept a goat since 2009.",
                "Ilse Brandt lives by the sea.",
                "Karl Weber used to feed a stork.",
            ),
        ),
        Shot(
            "What animal does Joren Pike keep?",
            "ferret",
            "Joren Pike animal kept",
            (
                "Joren Pike has kept a ferret for ten winters.",
                "Joren Pike owns two boats.",
                "Mina Dahl used to have a canary.",
            ),
        ),
        Shot(
            "What animal does Sanna Krol keep?",
            "tortoise",
            "Sanna Krol animal kept",
            (
                "Sanna Krol keeps a tortoise in the yard.",
                "Sanna Krol sings on Sundays.",
                "Peer Olm used to breed newts.",
            ),
        ),
    ),
    (
        Shot(
            "When was the bridge over the Elm opened?",
            "1931",
            "bridge over the Elm opening year",
            (
                "The bridge over the Elm was opened in 1931.",
                "The Elm is a short river in the north.",
                "The mill by the bridge closed in 1960.",
            ),
        ),
        Shot(
            "When was the lighthouse of Varn lit?",
            "1874",
            "lighthouse of Varn first lit year",
            (
                "The lighthouse of Varn was lit in 1874.",
                "Varn has a stony beach.",
                "The pier beside the lighthouse fell in 1903.",
            ),
        ),
        Shot(
            "When did the museum of Holt close?",
            "1786",
            "museum of Holt closing year",
            (
                "The museum of Holt closed in 1786.",
                "Holt lies behind a hill.",
                "The tower next to the museum burned down in 1812.",
            ),
        ),
    ),
    (
        Shot(
            "Who built the ferry Linnet?",
            "Harrow Yards",
            "ferry Linnet builder",
            (
                "The ferry Linnet was built by Harrow Yards.",
                "The Linnet carries forty cars.",
                "Greta Docks painted the ferry Plover.",
            ),
        ),
        Shot(
            "Who built the ferry Petrel?",
            "Corbel Shipwrights",
            "ferry Petrel builder",
            (
                "The ferry Petrel was built by Corbel Shipwrights.",
                "The Petrel sails at noon.",
                "Quill Docks repaired the ferry Dunlin.",
            ),
        ),
        Shot(
            "Who built the trams of Oster?",
            "Lowe Carriages",
            "trams of Oster builder",
            (
                "The trams of Oster were built by Lowe Carriages.",
                "Oster has steep streets.",
                "Osier Wheels scrapped the trams of Vell.",
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
