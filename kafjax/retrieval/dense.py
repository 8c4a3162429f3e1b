"""Passages by meaning: those whose vectors are nearest to the text's.

(hits,) = Dense(store, embedder).search(["Who makes maps?"], k=5)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kafjax.core.stopwatch import stage
from kafjax.retrieval.embed import Embedder
from kafjax.retrieval.retriever import Hit, check_query
from kafjax.retrieval.store import Store


class Dense:
    """Embeds texts and searches the store's vectors. A score is the product of two vectors: the
    cosine where they are of length 1."""

    def __init__(self, store: Store, embedder: Embedder):
        self.store, self.embedder = store, embedder

    def search(
        self, texts: Sequence[str], k: int, hypothetical: Sequence[str] | None = None
    ) -> list[list[Hit]]:
        """Implements `Retriever.search`. Also raises `UserError` for a text with a token that the
        encoder does not have."""
        check_query(texts, k, hypothetical)
        with stage("embed"):
            queries_QxD = self.embedder.embed_queries(texts)
            if hypothetical is not None:
                mean_QxD = queries_QxD + self.embedder.embed_documents(hypothetical)
                queries_QxD = mean_QxD / np.maximum(
                    np.linalg.norm(mean_QxD, axis=-1, keepdims=True), 1e-12
                )
        with stage("search"):
            return self.store.search(queries_QxD, min(k, max(1, len(self.store))))
