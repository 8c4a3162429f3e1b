"""Many rankings as one: reciprocal rank fusion (Cormack, Clarke and Buettcher 2009), or a weighted
sum of scores (Bruch, Gai and Ingber 2023, "An Analysis of Fusion Functions for Hybrid Retrieval")."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from kafjax.retrieval.retriever import Hit, Retriever, check_query

CONSTANT = 60
"""The paper's constant: the larger it is, the less the first ranks count against the next ones."""
DEPTH = 100
"""Hits of each ranking that are fused, or k if that is more."""


class Hybrid:
    """Fuses what several retrievers find, by ranks or, with a weight for each, by scores. They must
    search the same passages.

    >>> from kafjax.core.records import Passage
    >>> from kafjax.retrieval import Lexical, Store
    >>> lexical = Lexical(Store(None, [Passage("a", "Mira draws maps."), Passage("b", "Ada paints bells.")]))
    >>> (hits,) = Hybrid(lexical, lexical).search(["maps and bells"], k=1)
    >>> [hit.passage.id for hit in hits]
    ['a']
    """

    def __init__(self, *retrievers: Retriever, weights: Sequence[float] | None = None):
        self.retrievers, self.weights = retrievers, weights

    def search(
        self, texts: Sequence[str], k: int, hypothetical: Sequence[str] | None = None
    ) -> list[list[Hit]]:
        """Implements `Retriever.search`."""
        check_query(texts, k, hypothetical)
        found = [
            retriever.search(texts, max(k, DEPTH), hypothetical) for retriever in self.retrievers
        ]
        return [
            (fuse(rankings) if self.weights is None else weigh(rankings, self.weights))[:k]
            for rankings in zip(*found, strict=True)
        ]


def fuse(rankings: Sequence[Sequence[Hit]], constant: int = CONSTANT) -> list[Hit]:
    """Fuses rankings: a passage scores the sum over its rankings of `1 / (constant + rank)`, ranks
    from 1.

    Of equal scores the passage that an earlier ranking holds comes first.

        >>> from kafjax.core.records import Passage
        >>> a, b, c = (Hit(Passage(id, id), 0.5) for id in "abc")
        >>> [(hit.passage.id, round(hit.score, 4)) for hit in fuse([[a, b], [b, c]])]
        [('b', 0.0325), ('a', 0.0164), ('c', 0.0161)]
    """
    return _summed(
        [Hit(hit.passage, 1 / (constant + rank)) for rank, hit in enumerate(ranking, 1)]
        for ranking in rankings
    )


def weigh(rankings: Sequence[Sequence[Hit]], weights: Sequence[float]) -> list[Hit]:
    """Fuses rankings: a passage scores the weighted sum of its scores, which are stretched to 0
    (the lowest of a ranking) to 1 (its best); what a ranking does not hold has 0 there.

    Of equal scores the passage that an earlier ranking holds comes first.

        >>> from kafjax.core.records import Passage
        >>> a, b, c = (Passage(id, id) for id in "abc")
        >>> dense, lexical = [Hit(a, 0.9), Hit(b, 0.8), Hit(c, 0.5)], [Hit(b, 7.0), Hit(c, 2.0)]
        >>> [(hit.passage.id, round(hit.score, 3)) for hit in weigh([dense, lexical], [0.6, 0.4])]
        [('b', 0.85), ('a', 0.6), ('c', 0.0)]
    """
    return _summed(
        [
            Hit(hit.passage, weight * share)
            for hit, share in zip(ranking, _stretched(ranking), strict=True)
        ]
        for ranking, weight in zip(rankings, weights, strict=True)
    )


def _stretched(ranking: Sequence[Hit]) -> list[float]:
    if not ranking:
        return []
    best, lowest = ranking[0].score, ranking[-1].score
    return [(hit.score - lowest) / (best - lowest) if best > lowest else 1.0 for hit in ranking]


def _summed(rankings: Iterable[Sequence[Hit]]) -> list[Hit]:
    """Adds up the scores of each passage, best first."""
    fused: dict[str, Hit] = {}
    for hit in itertools.chain.from_iterable(rankings):
        before = fused[hit.passage.id].score if hit.passage.id in fused else 0.0
        fused[hit.passage.id] = Hit(hit.passage, before + hit.score)
    return sorted(fused.values(), key=lambda hit: -hit.score)
