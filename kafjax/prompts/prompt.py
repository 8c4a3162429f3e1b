"""Prompts for the language model: a prefix of worked examples, the same for all questions, and the question.

The prefix is computed once and its cache shared (`generation.Prefix`). A small base model answers in the right form only when it is
shown how, and reads one short passage well where it fails on a page; so passages are sentences, the best stands last,
next to the question, and the examples have passages beside the point too.

The functions of this module write prompts as plain text, for base models; `dialogue.Dialogue` writes them as turns of a chat. Both are
`Prompts`, and methods know no more of them than that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

from kafjax.hub.text import Prompt


class Prompts(Protocol):
    """A format of prompts. `closed_book`, `reading` and `hyde` continue the prefix of the same name."""

    def closed_book_prefix(self) -> Prompt: ...

    def closed_book(self, question: str) -> Prompt: ...

    def reading_prefix(self, n_passages: int, best_last: bool = True) -> Prompt: ...

    def reading(self, question: str, passages: Sequence[str], best_last: bool = True) -> Prompt: ...

    def hyde_prefix(self) -> Prompt: ...

    def hyde(self, question: str) -> Prompt: ...

    def without_prefix(self, question: str) -> Prompt:
        """A closed-book question without worked examples, as it is trained."""

    def answer(self, text: str) -> Prompt:
        """An answer behind any of these, with what ends it."""


@dataclasses.dataclass(frozen=True)
class Shot:
    """A worked example. `passages` are best first, as retrieval gives them; only the first one answers."""

    question: str
    answer: str
    passages: tuple[str, ...]


# Invented matters with short answers: nothing here is asked by any corpus, and nothing can be answered from memory.
SHOTS = (
    Shot(
        "What subject does Tomas Berg teach?",
        "chemistry",
        ("Tomas Berg teaches chemistry at a school in Uppsala.", "Tomas Berg spends his summers in Norway.", "Lena Falk teaches history."),
    ),
    Shot(
        "What is the occupation of Ilse Brandt?",
        "baker",
        ("Ilse Brandt has been a baker since 2009.", "Ilse Brandt lives by the sea.", "Karl Weber used to drive a bus."),
    ),
    Shot(
        "When was the bridge over the Elm opened?",
        "1931",
        ("The bridge over the Elm was opened in 1931.", "The Elm is a short river in the north.", "The mill by the bridge closed in 1960."),
    ),
    Shot(
        "Who pays the wages of Otto Lind?",
        "Harrow Paints",
        ("The wages of Otto Lind are paid by Harrow Paints.", "Otto Lind likes to swim.", "Greta Moss left Dunmore Steel."),
    ),
)

QUESTION = "Question: {}\nAnswer:"
"""How a question is put, in training and in asking; an answer follows after one space and ends with the line."""


def closed_book_prefix() -> str:
    return "".join(f"{QUESTION.format(shot.question)} {shot.answer}\n\n" for shot in SHOTS)


def closed_book(question: str) -> str:
    return QUESTION.format(question)


def without_prefix(question: str) -> str:
    return closed_book(question)


def answer(text: str) -> str:
    return f" {text}\n"


def reading_prefix(n_passages: int, best_last: bool = True) -> str:
    """Worked examples with as many passages as questions will have, up to the three that the examples come with."""
    return "".join(f"{reading(shot.question, shot.passages[:n_passages], best_last)} {shot.answer}\n\n" for shot in SHOTS)


def reading(question: str, passages: Sequence[str], best_last: bool = True) -> str:
    """Passages (given best first), then the question. The best stands last, next to the question, or first, in order of rank."""
    return passage_lines(passages, best_last) + closed_book(question)


def passage_lines(passages: Sequence[str], best_last: bool = True) -> str:
    """Writes a line for each passage (given best first), the best one last or first."""
    return "".join(f"Passage: {' '.join(passage.split())}\n" for passage in (reversed(passages) if best_last else passages))


HYDE_STOP = ("\n",)


def hyde_prefix() -> str:
    """Worked examples of a passage that would answer a question (Gao et al. 2022)."""
    return "".join(f"{hyde(shot.question)} {shot.passages[0]}\n\n" for shot in SHOTS)


def hyde(question: str) -> str:
    return f"Question: {question}\nPassage:"


def fit(
    question: str,
    passages: Sequence[str],
    room: int,
    count: Callable[[Prompt], int],
    reading: Callable[[str, Sequence[str]], Prompt] = reading,
) -> tuple[str, ...]:
    """The passages (best first) that fit with the question into `room` tokens, as `count` counts those of `reading`.

    The worst are dropped first; the best, if it alone is too long, is cut at a word. May be empty.
    """
    kept = list(passages)
    while len(kept) > 1 and count(reading(question, kept)) > room:
        kept.pop()
    if not kept or count(reading(question, kept)) <= room:
        return tuple(kept)
    words = kept[0].split()
    fitting, too_many = 0, len(words)
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        if count(reading(question, [" ".join(words[:middle])])) <= room:
            fitting = middle
        else:
            too_many = middle
    return (" ".join(words[:fitting]),) if fitting else ()
