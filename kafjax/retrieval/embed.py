"""Texts to unit vectors, in few compiled shapes.

embedder = Embedder(*hub.load("minilm"), hub.tokenizer("minilm"))
vectors_NxD = embedder.embed_documents([passage.text for passage in passages])
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.core.programs import compiler_options
from kafjax.core.progress import Advance, say, unshown
from kafjax.hub.text import check_ids
from kafjax.models import Encoder, EncoderConfig
from kafjax.parallel import BATCH_AXES, make_mesh

SHORTEST = 16
TOKENS_A_ROW = 64  # a batch of longer texts has fewer rows
WINDOW = 4_096  # texts tokenised and sorted at a time, while the ones before are embedded
AUTO, DTYPES = "auto", ("float32", "bfloat16")
WORTH = 0.75  # share of float32's time at which products in bfloat16 are


class Embedder:
    """The encoder as a function from texts to vectors.

    Texts are sorted by length, cut into batches, and padded to one of some lengths (16, 24, ...
    `max_length`, four to a power of two) and batch sizes (1, 4, 16, ... `batch`, fewer where texts
    are long), so that some programs serve all inputs, and one query does not pay for a full batch.
    Batches are split over the devices of this process.
    """

    def __init__(
        self,
        model: Encoder,
        params: trees.Tree,
        tokenizer: tokenizers.Tokenizer,
        max_length: int | None = None,
        batch: int | None = None,
        dtype: str = "float32",
    ):
        """Takes texts of up to `max_length` tokens, special ones included; by default what the
        encoder's folder says.

        Args:
          batch: rows embedded at a time; by default 64, on a CPU 16: there a larger batch computes
            no faster, and its texts differ more in length, so that more of it is padding.
          dtype: of the products, float32 or bfloat16, or auto for what `fastest_dtype` measures.
            Sums, norms and vectors are float32. On a CPU with AMX or AVX512-BF16, on a GPU and on a
            TPU bfloat16 takes about half the time; its vectors differ in the third decimal.

        Raises:
          UserError: the model has fewer positions.
        """
        max_length = max_length or model.config.longest or model.config.max_length
        if not 3 <= max_length <= model.config.max_length:  # [CLS], a token, [SEP]
            raise UserError(
                f"max_length={max_length} is outside the encoder's 3 to {model.config.max_length} tokens"
            )
        if batch is None:
            batch = 16 if jax.default_backend() == "cpu" else 64
        if batch < 1:
            raise UserError(f"batch={batch} must be at least 1")
        self.dimension: int = model.config.dimension
        self.config, self.max_length = model.config, max_length
        if dtype not in (*DTYPES, AUTO):
            raise UserError(f"dtype={dtype} is none of {', '.join((*DTYPES, AUTO))}")
        devices = jax.local_devices()
        mesh = make_mesh(f"data:{len(devices)}", devices)
        whole, split = (
            jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
            for axes in ((), (BATCH_AXES,))
        )
        if dtype == AUTO:
            dtype = fastest_dtype()
            say("embedding", f"products in {dtype}, the fastest here")
        layers = {
            path: leaf.astype(dtype) if path.endswith("/kernel") else leaf
            for path, leaf in trees.flatten(params["layers"]).items()
        }
        self._params = jax.device_put({**params, "layers": trees.unflatten(layers)}, whole)
        self._apply = jax.jit(
            model.apply,
            in_shardings=(whole, split, split),
            compiler_options=compiler_options(jax.default_backend()),
        )
        # A copy: truncation is a setting of the tokenizer, and keeps the closing special token only
        # if set there.
        self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length)
        self._lengths = lengths_up_to(max_length)
        self._batches = [-(-rows // len(devices)) * len(devices) for rows in steps(1, batch, 4)]
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
            digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    def embed(self, texts: Sequence[str], advance: Advance = unshown) -> np.ndarray:
        """Embeds texts as they are: float32 `[N, D]`, in the order of `texts`; longer ones are
        truncated, empty ones allowed.

        Passages go through `embed_documents` and questions through `embed_queries`, which put the
        encoder's prompts before them. `advance` is told the size of each batch that is done.

        Raises:
          UserError: a single string, or a text with a token that the model does not have.
        """
        return self._embed(texts, advance)[0]

    def embed_documents(self, texts: Sequence[str], advance: Advance = unshown) -> np.ndarray:
        """Embeds passages, each behind the encoder's document prompt, and tells how many are not
        read to their end."""
        return self._told(texts, self.config.document_prompt, "passages", advance)

    def embed_queries(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds questions, each behind the encoder's query prompt, and tells how many are not read
        to their end."""
        return self._told(texts, self.config.query_prompt, "questions", unshown)

    def _told(self, texts: Sequence[str], prompt: str, what: str, advance: Advance) -> np.ndarray:
        vectors_NxD, n_cut = self._embed([prompt + text for text in texts], advance)
        if n_cut:
            say(
                "embedding",
                f"{n_cut} of {len(texts)} {what} are longer than {self.max_length} tokens and are not read to their end",
            )
        return vectors_NxD

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

    def _embed(self, texts: Sequence[str], advance: Advance) -> tuple[np.ndarray, int]:
        """Returns vectors, and the number of texts that are cut."""
        if isinstance(texts, str):
            raise UserError(f"expected a list of texts, got the one string '{texts[:40]}'")
        vectors_NxD, n_cut = np.zeros((len(texts), self.dimension), np.float32), 0
        under_way: list[tuple[list[int], jax.Array]] = []

        def take() -> None:
            rows, vectors_BxD = under_way.pop(0)
            vectors_NxD[rows] = np.asarray(vectors_BxD)[: len(rows)]
            advance(len(rows))

        for start, tokens, cut in self._tokenised(texts):
            n_cut += cut
            for rows, tokens_BxT, mask_BxT in self._padded_batches(tokens):
                vectors_BxD = self._apply(self._params, tokens_BxT, mask_BxT)
                under_way.append(([start + row for row in rows], vectors_BxD))
                if len(under_way) > 1:  # the device has the next batch while this one is copied
                    take()
        while under_way:
            take()
        return vectors_NxD, n_cut

    def _tokenised(self, texts: Sequence[str]) -> Iterator[tuple[int, list[list[int]], int]]:
        """Yields the first row of each window, its texts' tokens, and how many of them are cut. A
        thread has the next window ready."""

        def encode(start: int) -> tuple[list[list[int]], int]:
            window = texts[start : start + WINDOW]
            encoded = self._tokenizer.encode_batch(self._spelled(window))
            tokens = [encoding.ids for encoding in encoded]
            for text, ids in zip(window, tokens, strict=True):
                check_ids(
                    ids, self.config.vocab_size, f"text '{text[:40]}' for the embedding model"
                )
            return tokens, sum(bool(encoding.overflowing) for encoding in encoded)

        starts = range(0, len(texts), WINDOW)
        if len(starts) < 2:
            yield from ((start, *encode(start)) for start in starts)
            return
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            ahead = thread.submit(encode, 0)
            for start in starts:
                tokens, cut = ahead.result()
                if start + WINDOW < len(texts):
                    ahead = thread.submit(encode, start + WINDOW)
                yield start, tokens, cut

    def _padded_batches(
        self, tokens: list[list[int]]
    ) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
        longest_first = sorted(range(len(tokens)), key=lambda row: -len(tokens[row]))
        most, i = self._batches[-1], 0
        while i < len(tokens):
            fitting = most * TOKENS_A_ROW // self._padded_length(len(tokens[longest_first[i]]))
            sizes = [size for size in self._batches if size <= fitting]
            rows = longest_first[i : i + (sizes or self._batches[:1])[-1]]
            yield rows, *self._pad([tokens[row] for row in rows])
            i += len(rows)

    def _padded_length(self, n: int) -> int:
        return next(length for length in self._lengths if length >= n)

    def _pad(self, tokens: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        B = next(size for size in self._batches if size >= len(tokens))
        T = self._padded_length(len(tokens[0]))
        tokens_BxT, mask_BxT = np.zeros((B, T), np.int32), np.zeros((B, T), bool)
        for row, ids in enumerate(tokens):
            tokens_BxT[row, : len(ids)] = ids
            mask_BxT[row, : len(ids)] = True
        return tokens_BxT, mask_BxT


@functools.cache
def fastest_dtype() -> str:
    """Measures products of the size of a small encoder's on this process's device: bfloat16 where
    it takes at most three quarters of float32's time, else float32.

    Where the hardware has bfloat16 products they take half of it, elsewhere more than all of it, so
    that a measurement among other work chooses the same.
    """
    x_BxI, kernel_IxO = np.ones((1_024, 384), np.float32), np.ones((384, 1_536), np.float32)
    multiply = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))
    sides = {dtype: (jnp.asarray(x_BxI, dtype), jnp.asarray(kernel_IxO, dtype)) for dtype in DTYPES}
    least = dict.fromkeys(sides, float("inf"))
    for turn in range(8):
        for dtype, operands in sides.items():
            began = time.perf_counter()
            multiply(*operands).block_until_ready()
            if turn:  # the first one compiles
                least[dtype] = min(least[dtype], time.perf_counter() - began)
    return "bfloat16" if least["bfloat16"] <= WORTH * least["float32"] else "float32"


def steps(first: int, last: int, factor: int) -> list[int]:
    """`first`, `first * factor`, ... as far as they are below `last`, then `last`."""
    steps = []
    while first < last:
        steps.append(first)
        first *= factor
    return [*steps, last]


def lengths_up_to(last: int) -> list[int]:
    """Padded lengths, four to a power of two: at most a fifth of a longer text's row is padding.

    >>> lengths_up_to(100)
    [16, 24, 32, 40, 48, 56, 64, 80, 96, 100]
    """
    lengths, length = [], SHORTEST
    while length < last:
        lengths.append(length)
        length += max(8, 1 << (length.bit_length() - 3))
    return [*lengths, last]
