"""The protocol of retrieval: texts in, passages with their scores out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from kafjax.core.errors import UserError
from kafjax.core.records import Passage


@dataclasses.dataclass(frozen=True)
class Hit:
    """A passage that was found. Scores of one search compare with each other; those of two kinds of
    retriever do not.

    >>> Hit(Passage("a", "Mira draws maps."), 0.5).passage.text
    'Mira draws maps.'
    """

    passage: Passage
    score: float


class Retriever(Protocol):
    """Finds passages for texts: by meaning (`Dense`), by words (`Lexical`), by both (`Hybrid`), or
    read again (`Reranked`).

    >>> from kafjax.retrieval import Lexical, Store
    >>> retriever: Retriever = Lexical(Store(None, [Passage("a", "Mira draws maps.")]))
    >>> [[hit.passage.id for hit in hits] for hits in retriever.search(["maps", "bells"], k=1)]
    [['a'], []]
    """

    def search(
        self, texts: Sequence[str], k: int, hypothetical: Sequence[str] | None = None
    ) -> list[list[Hit]]:
        """Returns at most `k` hits for each text, best first. The seconds of its stages go to
        `core.stopwatch`.

        Args:
          hypothetical: for each text a passage that a model made up to answer it (HyDE, Gao et al.
            2022): vectors are averaged (equation 8), words are added to the query, and a reranker
            leaves it aside.

        Raises:
          UserError: `k < 1`, texts that are not a list of strings, or another number of
            hypothetical passages.
        """
        ...


def check_query(texts: Sequence[str], k: int, hypothetical: Sequence[str] | None) -> None:
    """Refuses what no retriever takes. Raises `UserError` as `Retriever.search` says."""
    if isinstance(texts, str):
        raise UserError(f"expected a list of texts, got the one string '{texts[:40]}'")
    for text in (*texts, *(hypothetical or ())):
        if not isinstance(text, str):
            raise UserError(f"expected texts to search for, got {text!r:.40}")
    if k < 1:
        raise UserError(f"k={k} passages were asked for; k must be at least 1")
    if hypothetical is not None and len(hypothetical) != len(texts):
        raise UserError(
            f"{len(hypothetical)} hypothetical passages for {len(texts)} texts; give one for each"
        )
