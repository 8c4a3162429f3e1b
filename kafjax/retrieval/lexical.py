"""Passages by words: BM25 (Robertson et al. 1994), computed by the package `bm25s` (Lù 2024)."""

from __future__ import annotations

import importlib.util
import logging
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import regex

from kafjax.core.errors import UserError
from kafjax.core.stopwatch import stage
from kafjax.core.words import word_spans
from kafjax.retrieval.retriever import Hit, check_query
from kafjax.retrieval.store import Store

# letters with their marks: the standard library's \w ends at the vowel signs of Hindi and Thai
_WORD = regex.compile(r"\w+")


class Lexical:
    """Scores passages by the words they share with the text: Lucene's BM25, k1 = 1.5, b = 0.75.

    Rare words weigh more, so no list of stop words is needed and no language is assumed. A passage
    that shares no word with the text is no hit, so there may be fewer than `k`. The index is made
    of the store's texts on the first search, and again after the store has changed: nothing of it
    is kept on disk.

        >>> from kafjax.core.records import Passage
        >>> store = Store(None, [Passage("a", "Mira draws maps."), Passage("b", "Ada paints bells.")])
        >>> (hits,) = Lexical(store).search(["Who paints?"], k=5)
        >>> [hit.passage.id for hit in hits]
        ['b']
    """

    def __init__(self, store: Store):
        """Raises `UserError` where `bm25s` is not installed."""
        check_installed()
        self.store = store
        self._scores, self._made_at = _Scores(()), -1

    def search(
        self, texts: Sequence[str], k: int, hypothetical: Sequence[str] | None = None
    ) -> list[list[Hit]]:
        """Implements `Retriever.search`. Passages of one score stand in the order of the store."""
        check_query(texts, k, hypothetical)
        asked = (
            texts
            if hypothetical is None
            else [f"{text} {more}" for text, more in zip(texts, hypothetical, strict=True)]
        )
        with stage("search"):
            passages = self.store.passages
            if self._made_at != self.store.n_changes:
                self._scores, self._made_at = (
                    _Scores([passage.text for passage in passages]),
                    self.store.n_changes,
                )
            return [
                [Hit(passages[row], score) for row, score in self._scores.best(words(text), k)]
                for text in asked
            ]


class _Scores:
    """The BM25 scores of some texts, in their order."""

    def __init__(self, texts: Sequence[str]):
        import bm25s

        # it would tell of every index that it builds
        logging.getLogger("bm25s").setLevel(logging.WARNING)
        tokens = [words(text) for text in texts]
        self._model: Any = None  # None where there is no word at all: bm25s cannot index nothing
        if any(tokens):
            self._model = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
            self._model.index(tokens, show_progress=False)

    def best(self, query: list[str], k: int) -> list[tuple[int, float]]:
        """Returns rows and scores of the `k` best passages among those that hold a word of the
        query."""
        known = (
            []
            if self._model is None
            else [word for word in query if word in self._model.vocab_dict]
        )
        if not known:
            return []
        scores_N = self._model.get_scores(known)
        least = np.partition(scores_N, -k)[-k] if k < len(scores_N) else 0.0
        rows = np.flatnonzero((scores_N > 0) & (scores_N >= least))
        rows = rows[np.argsort(-scores_N[rows], kind="stable")][:k]
        return [(int(row), float(scores_N[row])) for row in rows]


def check_installed() -> None:
    """Raises `UserError` where `bm25s` is not installed."""
    if importlib.util.find_spec("bm25s") is None:
        raise UserError(
            "BM25 needs the package bm25s; pip install 'kafjax[retrieval]', or search with --retriever=dense"
        )


def words(text: str) -> list[str]:
    """Splits a text into runs of letters and digits, caseless, after Unicode NFKC. Scripts without
    blanks give a word for each letter.

    >>> words("Café №7, 地图")
    ['café', 'no7', '地', '图']
    """
    runs = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return [run[start:end] for run in runs for start, end in word_spans(run)]
