"""Gold passages: those that answer a question, told from the ids and the answers that it names."""

from __future__ import annotations

import collections
import difflib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kafjax.core.errors import UserError
from kafjax.core.records import Document, Passage
from kafjax.corpus import rows

Gold = Mapping[str, tuple[Passage, ...]]
"""The passages that each id in a question's `passages` stands for."""
_WORD = re.compile(r"\w+")


def gold_ids(
    documents: Iterable[Document], passages: Iterable[Passage], kept: Mapping[str, str]
) -> Gold:
    """Maps each id in a question's `passages` to passages: a document to all of its own, a passage
    to the one kept in its place."""
    by_id = {passage.id: passage for passage in passages}
    of_document: dict[str, dict[str, Passage]] = {document.id: {} for document in documents}
    for passage, representative in kept.items():
        of_document[passage.rpartition("#")[0]][representative] = by_id[representative]
    return {passage: (by_id[representative],) for passage, representative in kept.items()} | {
        document: tuple(own.values()) for document, own in of_document.items()
    }


def gold_of(
    place: str, row: dict[str, Any], answers: tuple[str, ...], gold: Gold, without: list[str]
) -> tuple[str, ...]:
    """Reads the ids of a question's gold passages: of a document those that hold an accepted
    answer, first the one with most of the question's words, since it alone is what an oracle reads.

    Where none does they are all of the document's, and the question's id goes to `without`.
    """
    found: dict[str, None] = {}
    for passage in rows.strings(place, row, "passages") if row.get("passages") is not None else ():
        if passage not in gold:
            close = difflib.get_close_matches(
                passage, itertools.islice(gold, 100_000), n=1, cutoff=0.0
            )
            raise UserError(
                f"{place}: gold passage '{passage}' of question '{row['id']}' matches nothing in the corpus "
                f"(nearest: '{close[0]}'; ids with '#' depend on the chunk size)"
            )
        own = gold[passage]
        if len(own) > 1:
            own = _nearest_first(own, row["question"])
        with_answer = holding(own, answers) if len(own) > 1 else list(own)
        if not with_answer:
            without.append(row["id"])
        found |= dict.fromkeys(one.id for one in with_answer or own)
    return tuple(found)


def holding(passages: Sequence[Passage], answers: Sequence[str]) -> list[Passage]:
    """Returns the passages that hold one of the answers, as whole words, whatever the case,
    punctuation and blanks."""
    # Scripts beyond ASCII may not separate words: there an answer is looked for anywhere.
    wanted = [
        plain if plain.isascii() else plain.strip()
        for answer in answers
        if (plain := _plain(answer)).strip()
    ]
    return [
        passage
        for passage in passages
        if any(answer in text for text in [_plain(passage.text)] for answer in wanted)
    ]


def _nearest_first(passages: Sequence[Passage], question: str) -> tuple[Passage, ...]:
    """Sorts the passages of a document by the question's words in them. A word counts the more, the
    fewer of the passages hold it: a short answer such as "2" stands in many."""
    asked = set(_WORD.findall(question.casefold()))
    held = [asked & set(_WORD.findall(passage.text.casefold())) for passage in passages]
    often = collections.Counter(word for words in held for word in words)
    weights = [sum(1 / often[word] for word in words) for words in held]
    order = sorted(range(len(passages)), key=lambda i: -weights[i])
    return tuple(passages[i] for i in order)


def _plain(text: str) -> str:
    return f" {' '.join(_WORD.findall(text.casefold()))} "
