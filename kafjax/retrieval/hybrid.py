"""Many rankings as one: reciprocal rank fusion (Cormack, Clarke and Buettcher 2009)."""

from __future__ import annotations

from collections.abc import Sequence

from kafjax.retrieval.retriever import Hit, Retriever, check_query

CONSTANT = 60
"""The paper's constant: the larger it is, the less the first ranks count against the next ones."""
DEPTH = 100
"""Hits of each ranking that are fused, or k if that is more."""


class Hybrid:
    """Fuses what several retrievers find. They must search the same passages.

    >>> from kafjax.core.records import Passage
    >>> from kafjax.retrieval import Lexical, Store
    >>> lexical = Lexical(Store(None, [Passage("a", "Mira draws maps."), Passage("b", "Ada paints bells.")]))
    >>> (hits,) = Hybrid(lexical, lexical).search(["maps and bells"], k=1)
    >>> [hit.passage.id for hit in hits]
    ['a']
    """

    def __init__(self, *retrievers: Retriever):
        self.retrievers = retrievers

    def search(
        self, texts: Sequence[str], k: int, hypothetical: Sequence[str] | None = None
    ) -> list[list[Hit]]:
        """Implements `Retriever.search`."""
        check_query(texts, k, hypothetical)
        found = [
            retriever.search(texts, max(k, DEPTH), hypothetical) for retriever in self.retrievers
        ]
        return [fuse(rankings)[:k] for rankings in zip(*found, strict=True)]


def fuse(rankings: Sequence[Sequence[Hit]], constant: int = CONSTANT) -> list[Hit]:
    """Fuses rankings: a passage scores the sum over its rankings of `1 / (constant + rank)`, ranks
    from 1.

    Of equal scores the passage that an earlier ranking holds comes first.

        >>> from kafjax.core.records import Passage
        >>> a, b, c = (Hit(Passage(id, id), 0.5) for id in "abc")
        >>> [(hit.passage.id, round(hit.score, 4)) for hit in fuse([[a, b], [b, c]])]
        [('b', 0.0325), ('a', 0.0164), ('c', 0.0161)]
    """
    fused: dict[str, Hit] = {}
    for ranking in rankings:
        for rank, hit in enumerate(ranking, 1):
            before = fused[hit.passage.id].score if hit.passage.id in fused else 0.0
            fused[hit.passage.id] = Hit(hit.passage, before + 1 / (constant + rank))
    return sorted(fused.values(), key=lambda hit: -hit.score)
