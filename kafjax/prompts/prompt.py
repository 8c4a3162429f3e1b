"""Prompts for the language model: a prefix of worked examples, the same for all questions, and the
question.

The prefix is computed once and its cache shared (`generation.Prefix`). A small base model answers
in the right form only when it is shown how, and reads one short passage well where it fails on a
page; so passages are sentences, the best stands last, next to the question, and the examples have
passages beside the point too.

The functions of this module write prompts as plain text, for base models, and `Plain` with worked
examples chosen for a corpus; `dialogue.Dialogue` writes them as turns of a chat. All are `Prompts`,
and methods know no more of them than that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import regex

from kafjax.core.words import word_spans
from kafjax.hub.text import Prompt
from kafjax.prompts.shots import ALTERNATIVES, Shot


class Prompts(Protocol):
    """A format of prompts. `closed_book`, `reading`, `hyde` and `rewrite` continue the prefix of the same
    name."""

    def closed_book_prefix(self) -> Prompt: ...

    def closed_book(self, question: str) -> Prompt: ...

    def reading_prefix(self, n_passages: int, best_last: bool = True) -> Prompt: ...

    def reading(self, question: str, passages: Sequence[str], best_last: bool = True) -> Prompt: ...

    def hyde_prefix(self) -> Prompt: ...

    def hyde(self, question: str) -> Prompt: ...

    def rewrite_prefix(self) -> Prompt: ...

    def rewrite(self, question: str) -> Prompt: ...

    def without_prefix(self, question: str, passages: Sequence[str] = ()) -> Prompt:
        """A question without worked examples, as it is trained: closed-book, or behind passages,
        given best first."""

    def answer(self, text: str) -> Prompt:
        """An answer behind any of these, with what ends it."""


SHOTS = tuple(of_place[0] for of_place in ALTERNATIVES)
"""The worked examples of a corpus that asks for nothing in them."""

QUESTION = "Question: {}\nAnswer:"
"""How a question is put, in training and in asking; an answer follows after one space and ends with
the line."""


def closed_book_prefix(shots: Sequence[Shot] = SHOTS) -> str:
    return "".join(f"{QUESTION.format(shot.question)} {shot.answer}\n\n" for shot in shots)


def closed_book(question: str) -> str:
    return QUESTION.format(question)


def without_prefix(question: str, passages: Sequence[str] = ()) -> str:
    return reading(question, passages)


def answer(text: str) -> str:
    return f" {text}\n"


def reading_prefix(n_passages: int, best_last: bool = True, shots: Sequence[Shot] = SHOTS) -> str:
    """Worked examples with as many passages as questions will have, up to the three that the
    examples come with."""
    return "".join(
        f"{reading(shot.question, shot.passages[:n_passages], best_last)} {shot.answer}\n\n"
        for shot in shots
    )


def reading(question: str, passages: Sequence[str], best_last: bool = True) -> str:
    """Passages (given best first), then the question. The best stands last, next to the question,
    or first, in order of rank."""
    return passage_lines(passages, best_last) + closed_book(question)


def passage_lines(passages: Sequence[str], best_last: bool = True) -> str:
    """Writes a line for each passage (given best first), the best one last or first. Lines of code
    and of tables stay lines."""
    return "".join(
        f"Passage: {_shown(passage)}\n"
        for passage in (reversed(passages) if best_last else passages)
    )


def _shown(passage: str) -> str:
    """Joins the lines of prose. Blank lines are left out, since one ends a worked example."""
    if (
        "\n```" not in passage
        and "\n~~~" not in passage
        and "\n|" not in passage
        and not passage.startswith(("```", "~~~", "|"))
    ):
        return " ".join(passage.split())
    shown, fence = [], ""
    for line in passage.split("\n"):
        marks = _FENCE.match(line)
        before = fence
        if marks and (not fence or (line.startswith(fence) and not line.strip(fence[0]))):
            fence = "" if fence else marks[0]
        if not line.strip():
            continue
        alone = bool(before or fence or line.lstrip().startswith("|"))
        if alone or not shown or shown[-1][1]:
            shown.append((line.rstrip() if alone else " ".join(line.split()), alone))
        else:
            shown[-1] = (f"{shown[-1][0]} {' '.join(line.split())}", False)
    return "\n".join(text for text, _ in shown)


_FENCE = regex.compile(r"`{3,}|~{3,}")
HYDE_STOP = ("\n",)


def hyde_prefix(shots: Sequence[Shot] = SHOTS) -> str:
    """Worked examples of a passage that would answer a question (Gao et al. 2022)."""
    return "".join(f"{hyde(shot.question)} {shot.passages[0]}\n\n" for shot in shots)


def hyde(question: str) -> str:
    return f"Question: {question}\nPassage:"


def rewrite_prefix(shots: Sequence[Shot] = SHOTS) -> str:
    """Worked examples of a query to search with in place of a question (Ma et al. 2023)."""
    return "".join(f"{rewrite(shot.question)} {shot.query}\n\n" for shot in shots)


def rewrite(question: str) -> str:
    return f"Question: {question}\nSearch for:"


def fit(
    question: str,
    passages: Sequence[str],
    room: int,
    count: Callable[[Prompt], int],
    reading: Callable[[str, Sequence[str]], Prompt] = reading,
) -> tuple[str, ...]:
    """The passages (best first) that fit with the question into `room` tokens, as `count` counts
    those of `reading`.

    The worst are dropped first; the best, if it alone is too long, is cut at a word, or at a letter
    of a script without blanks. May be empty.
    """
    kept = list(passages)
    while len(kept) > 1 and count(reading(question, kept)) > room:
        kept.pop()
    if not kept or count(reading(question, kept)) <= room:
        return tuple(kept)
    ends = [0, *(end for _, end in word_spans(kept[0]))]
    fitting, too_many = 0, len(ends) - 1
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        if count(reading(question, [kept[0][: ends[middle]]])) <= room:
            fitting = middle
        else:
            too_many = middle
    return (kept[0][: ends[fitting]],) if fitting else ()


@dataclasses.dataclass(frozen=True)
class Plain:
    """Writes `Prompts` as plain text, behind these worked examples."""

    shots: tuple[Shot, ...] = SHOTS

    def closed_book_prefix(self) -> str:
        return closed_book_prefix(self.shots)

    def closed_book(self, question: str) -> str:
        return closed_book(question)

    def reading_prefix(self, n_passages: int, best_last: bool = True) -> str:
        return reading_prefix(n_passages, best_last, self.shots)

    def reading(self, question: str, passages: Sequence[str], best_last: bool = True) -> str:
        return reading(question, passages, best_last)

    def hyde_prefix(self) -> str:
        return hyde_prefix(self.shots)

    def hyde(self, question: str) -> str:
        return hyde(question)

    def rewrite_prefix(self) -> str:
        return rewrite_prefix(self.shots)

    def rewrite(self, question: str) -> str:
        return rewrite(question)

    def without_prefix(self, question: str, passages: Sequence[str] = ()) -> str:
        return without_prefix(question, passages)

    def answer(self, text: str) -> str:
        return answer(text)
