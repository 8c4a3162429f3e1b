"""Texts to unit vectors, in few compiled shapes."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
import tokenizers

from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.models import Encoder

SHORTEST = 16
WINDOW = 16_384  # texts tokenised and sorted at a time: bounds memory on a large corpus


class Embedder:
    """The encoder as a function from texts to vectors.

    Texts are sorted by length, cut into batches, and padded to one of a few lengths (16, 32, ... `max_length`) and batch sizes
    (1, 4, 16, ... `batch`), so that a handful of programs serves all inputs, and one query does not pay for a full batch.
    """

    def __init__(self, model: Encoder, params: trees.Tree, tokenizer: tokenizers.Tokenizer, max_length: int = 256, batch: int = 64):
        """`max_length` is in tokens, special ones included. Raises `UserError` if the model has fewer positions."""
        if not 3 <= max_length <= model.config.max_length:  # [CLS], a token, [SEP]
            raise UserError(f"max_length={max_length} is outside the encoder's 3 to {model.config.max_length} tokens")
        if batch < 1:
            raise UserError(f"batch={batch} must be at least 1")
        self.dimension: int = model.config.hidden_size
        self._params = params
        self._apply = jax.jit(model.apply)
        # A copy: truncation is a setting of the tokenizer, and keeps the closing special token only if set there.
        self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length)
        self._lengths = _steps(SHORTEST, max_length, 2)
        self._batches = _steps(1, batch, 4)

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits of a hash of weights and tokenizer: vectors of two embedders with different ones must not be compared."""
        digest = hashlib.blake2b(self._tokenizer.to_str().encode(), digest_size=8)
        for path, leaf in sorted(trees.flatten(self._params).items()):
            digest.update(path.encode())
            digest.update(np.ascontiguousarray(leaf).data)
        return digest.hexdigest()

    def embed(self, texts: Sequence[str], progress: Callable[[int, int], None] | None = None) -> np.ndarray:
        """Float32 `[N, D]`, L2-normalised, in the order of `texts`; longer ones are truncated, empty ones allowed.

        `progress(done, total)` is called after each batch. Raises `UserError` for a single string.
        """
        if isinstance(texts, str):
            raise UserError(f"expected a list of texts, got the one string '{texts[:40]}'")
        vectors_NxD = np.zeros((len(texts), self.dimension), np.float32)
        done = 0
        for rows, tokens_BxT, mask_BxT in self._padded_batches(texts):
            vectors_BxD = self._apply(self._params, tokens_BxT, mask_BxT)
            vectors_NxD[rows] = np.asarray(vectors_BxD)[: len(rows)]
            done += len(rows)
            if progress is not None:
                progress(done, len(texts))
        return vectors_NxD

    def _padded_batches(self, texts: Sequence[str]) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
        for start in range(0, len(texts), WINDOW):
            encoded = self._tokenizer.encode_batch(list(texts[start : start + WINDOW]))
            tokens = [encoding.ids for encoding in encoded]
            longest_first = sorted(range(len(tokens)), key=lambda row: -len(tokens[row]))
            for i in range(0, len(tokens), self._batches[-1]):
                rows = longest_first[i : i + self._batches[-1]]
                yield [start + row for row in rows], *self._pad([tokens[row] for row in rows])

    def _pad(self, tokens: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        B = next(size for size in self._batches if size >= len(tokens))
        T = next(length for length in self._lengths if length >= len(tokens[0]))
        tokens_BxT, mask_BxT = np.zeros((B, T), np.int32), np.zeros((B, T), bool)
        for row, ids in enumerate(tokens):
            tokens_BxT[row, : len(ids)] = ids
            mask_BxT[row, : len(ids)] = True
        return tokens_BxT, mask_BxT


def _steps(first: int, last: int, factor: int) -> list[int]:
    """`first`, `first * factor`, ... as far as they are below `last`, then `last`."""
    steps = []
    while first < last:
        steps.append(first)
        first *= factor
    return [*steps, last]
