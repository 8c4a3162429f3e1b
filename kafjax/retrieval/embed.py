"""Texts to unit vectors, in few compiled shapes.

embedder = Embedder(*hub.load("minilm"), hub.tokenizer("minilm"))
vectors_NxD = embedder.embed_documents([passage.text for passage in passages])
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import tokenizers

from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.core.progress import Advance, say, unshown
from kafjax.hub.text import check_ids
from kafjax.models import Encoder, EncoderConfig

SHORTEST = 16
WINDOW = 16_384  # texts tokenised and sorted at a time: bounds memory on a large corpus


class Embedder:
    """The encoder as a function from texts to vectors.

    Texts are sorted by length, cut into batches, and padded to one of a few lengths (16, 32, ...
    `max_length`) and batch sizes (1, 4, 16, ... `batch`), so that a handful of programs serves all
    inputs, and one query does not pay for a full batch.
    """

    def __init__(
        self,
        model: Encoder,
        params: trees.Tree,
        tokenizer: tokenizers.Tokenizer,
        max_length: int | None = None,
        batch: int = 64,
    ):
        """Takes texts of up to `max_length` tokens, special ones included; by default what the
        encoder's folder says.

        Raises:
          UserError: the model has fewer positions.
        """
        max_length = max_length or model.config.longest or model.config.max_length
        if not 3 <= max_length <= model.config.max_length:  # [CLS], a token, [SEP]
            raise UserError(
                f"max_length={max_length} is outside the encoder's 3 to {model.config.max_length} tokens"
            )
        if batch < 1:
            raise UserError(f"batch={batch} must be at least 1")
        self.dimension: int = model.config.dimension
        self.config, self.max_length = model.config, max_length
        self._params = params
        self._apply = jax.jit(model.apply)
        # A copy: truncation is a setting of the tokenizer, and keeps the closing special token only
        # if set there.
        self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length)
        self._lengths = steps(SHORTEST, max_length, 2)
        self._batches = steps(1, batch, 4)
        if self.config.query_prompt or self.config.document_prompt:
            say(
                "embedding",
                f"queries behind the prompt {self.config.query_prompt!r}, passages behind {self.config.document_prompt!r}",
            )

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits of a hash of weights and tokenizer: vectors of two embedders with different
        ones must not be compared."""
        digest = hashlib.blake2b(self._tokenizer.to_str().encode(), digest_size=8)
        digest.update(self._settings().encode())
        for path, leaf in sorted(trees.flatten(self._params).items()):
            digest.update(path.encode())
            digest.update(np.ascontiguousarray(leaf).data)
        return digest.hexdigest()

    def embed(self, texts: Sequence[str], advance: Advance = unshown) -> np.ndarray:
        """Embeds texts as they are: float32 `[N, D]`, in the order of `texts`; longer ones are
        truncated, empty ones allowed.

        Passages go through `embed_documents` and questions through `embed_queries`, which put the
        encoder's prompts before them. `advance` is told the size of each batch that is done.

        Raises:
          UserError: a single string, or a text with a token that the model does not have.
        """
        if isinstance(texts, str):
            raise UserError(f"expected a list of texts, got the one string '{texts[:40]}'")
        vectors_NxD = np.zeros((len(texts), self.dimension), np.float32)
        for rows, tokens_BxT, mask_BxT in self._padded_batches(texts):
            vectors_BxD = self._apply(self._params, tokens_BxT, mask_BxT)
            vectors_NxD[rows] = np.asarray(vectors_BxD)[: len(rows)]
            advance(len(rows))
        return vectors_NxD

    def embed_documents(self, texts: Sequence[str], advance: Advance = unshown) -> np.ndarray:
        """Embeds passages, each behind the encoder's document prompt, and tells how many are not
        read to their end."""
        prompted = [self.config.document_prompt + text for text in texts]
        if n_cut := sum(n > self.max_length for n in self.lengths(prompted)):
            say(
                "embedding",
                f"{n_cut} of {len(texts)} passages are longer than {self.max_length} tokens and are not read to their end",
            )
        return self.embed(prompted, advance)

    def embed_queries(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds questions, each behind the encoder's query prompt."""
        return self.embed([self.config.query_prompt + text for text in texts])

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Counts the tokens of each text, special ones included, without truncation."""
        counts = []
        for start in range(0, len(texts), WINDOW):
            for encoding in self._tokenizer.encode_batch(
                self._spelled(texts[start : start + WINDOW])
            ):
                special = sum(encoding.special_tokens_mask)
                counts.append(
                    len(encoding.ids)
                    + sum(len(rest.ids) - special for rest in encoding.overflowing)
                )
        return counts

    def _settings(self) -> str:
        """Names the settings that change vectors beside weights and tokenizer; nothing where all
        are the usual ones."""
        c, usual = self.config, EncoderConfig(1, 1, 1, 1, 1)
        names = ("pooling", "dense", "normalise", "lower_case", "query_prompt", "document_prompt")
        odd = {name: getattr(c, name) for name in names if getattr(c, name) != getattr(usual, name)}
        return repr(odd) if odd else ""

    def _spelled(self, texts: Sequence[str]) -> list[str]:
        return [text.lower() for text in texts] if self.config.lower_case else list(texts)

    def _padded_batches(
        self, texts: Sequence[str]
    ) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
        for start in range(0, len(texts), WINDOW):
            encoded = self._tokenizer.encode_batch(self._spelled(texts[start : start + WINDOW]))
            tokens = [encoding.ids for encoding in encoded]
            for text, ids in zip(texts[start : start + WINDOW], tokens, strict=True):
                check_ids(
                    ids, self.config.vocab_size, f"text '{text[:40]}' for the embedding model"
                )
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


def steps(first: int, last: int, factor: int) -> list[int]:
    """`first`, `first * factor`, ... as far as they are below `last`, then `last`."""
    steps = []
    while first < last:
        steps.append(first)
        first *= factor
    return [*steps, last]
