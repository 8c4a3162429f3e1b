"""Reranking: a cross-encoder sees question and passage together and orders by its score.

model, params = hub.load_cross_encoder("cross-encoder/ms-marco-MiniLM-L6-v2")
scorer = CrossScorer(model, params, hub.tokenizer("cross-encoder/ms-marco-MiniLM-L6-v2"))
scorer = open_scorer("cross-encoder/ms-marco-MiniLM-L6-v2")  # the same
(hits,) = Reranked(retriever, scorer).search(["Who makes maps?"], k=5)
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
import tokenizers

from kafjax import hub
from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.core.stopwatch import stage
from kafjax.hub.text import check_ids
from kafjax.models import CrossEncoder
from kafjax.retrieval.embed import SHORTEST, steps
from kafjax.retrieval.retriever import Hit, Retriever, check_query


class CrossScorer:
    """The cross-encoder as a function from pairs of texts to scores, in few compiled shapes (as
    `Embedder`)."""

    def __init__(
        self,
        model: CrossEncoder,
        params: trees.Tree,
        tokenizer: tokenizers.Tokenizer,
        batch: int = 64,
    ):
        """Raises `UserError` for a tokenizer that does not tell the texts of a pair apart."""
        config = model.encoder.config
        self._params, self._apply, self.config = params, jax.jit(model.apply), config
        longest = config.longest or config.max_length
        self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(longest, strategy="longest_first")
        if set(self._tokenizer.encode("a", "b").type_ids) != {0, 1}:
            raise UserError(
                "the reranker's tokenizer.json gives both texts of a pair one type; it needs BERT's template for pairs"
            )
        self._lengths, self._batches = steps(SHORTEST, longest, 2), steps(1, batch, 4)

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Scores pairs, float32 `[N]`; the longer text of a pair that is too long is truncated
        first.

        Raises:
          UserError: a text with a token that the model does not have.
        """
        lower = self.config.lower_case
        encoded = self._tokenizer.encode_batch(
            [(a.lower(), b.lower()) if lower else (a, b) for a, b in pairs]
        )
        for (_, text), encoding in zip(pairs, encoded, strict=True):
            check_ids(encoding.ids, self.config.vocab_size, f"text '{text[:40]}' for the reranker")
        scores_N = np.zeros(len(pairs), np.float32)
        longest_first = sorted(range(len(pairs)), key=lambda row: -len(encoded[row].ids))
        for i in range(0, len(pairs), self._batches[-1]):
            rows = longest_first[i : i + self._batches[-1]]
            scores_B = self._apply(self._params, *self._pad([encoded[row] for row in rows]))
            scores_N[rows] = np.asarray(scores_B)[: len(rows)]
        return scores_N

    def _pad(self, encoded: list[tokenizers.Encoding]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        B = next(size for size in self._batches if size >= len(encoded))
        T = next(length for length in self._lengths if length >= len(encoded[0].ids))
        tokens_BxT, mask_BxT, types_BxT = (
            np.zeros((B, T), np.int32),
            np.zeros((B, T), bool),
            np.zeros((B, T), np.int32),
        )
        for row, encoding in enumerate(encoded):
            n = len(encoding.ids)
            tokens_BxT[row, :n], mask_BxT[row, :n], types_BxT[row, :n] = (
                encoding.ids,
                True,
                encoding.type_ids,
            )
        return tokens_BxT, mask_BxT, types_BxT


def open_scorer(name: str) -> CrossScorer:
    """Opens a reranker: a folder of a BERT classifier with one label, or `ORG/NAME`. Raises
    `UserError` as `hub.load_cross_encoder`."""
    model, params = hub.load_cross_encoder(name)
    return CrossScorer(model, params, hub.tokenizer(name))


class Reranked:
    """Orders the best `candidates` of another retriever by a cross-encoder, and keeps `k`."""

    def __init__(self, retriever: Retriever, scorer: CrossScorer, candidates: int = 50):
        self.retriever, self.scorer, self.candidates = retriever, scorer, candidates

    def search(
        self, texts: Sequence[str], k: int, hypothetical: Sequence[str] | None = None
    ) -> list[list[Hit]]:
        """Implements `Retriever.search`. Passages of one score keep the order in which they were
        found."""
        check_query(texts, k, hypothetical)
        found = self.retriever.search(texts, max(k, self.candidates), hypothetical)
        with stage("rerank"):
            pairs = [
                (text, hit.passage.text)
                for text, hits in zip(texts, found, strict=True)
                for hit in hits
            ]
            scores = iter(self.scorer.score(pairs).tolist())
        reranked = [[Hit(hit.passage, next(scores)) for hit in hits] for hits in found]
        return [sorted(hits, key=lambda hit: -hit.score)[:k] for hits in reranked]
