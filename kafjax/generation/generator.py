"""Text in, text out: batches prompts by length, runs prefill and decode, cuts replies at stop strings, keeps the time."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.generation.decode import bucket, decode, first_token, prefill
from kafjax.generation.sample import Sampling
from kafjax.models import Cache, Decoder


@dataclasses.dataclass(frozen=True)
class Prefix:
    """The beginning of a prompt that many share, computed once. `n_tokens` slots of `cache` (batch 1) are filled."""

    text: str
    n_tokens: int
    cache: Cache


@dataclasses.dataclass(frozen=True)
class Generation:
    """A reply and its bill. `prompt_tokens` counts all of the prompt, `cached_tokens` the part that came from a `Prefix`.

    Seconds are of the whole batch that the reply was made in.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def output_tokens(self) -> int:
        return len(self.tokens)


class Generator:
    """Generates with one model and tokenizer; parameters are given at each call, so many sets of weights share the programs."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, batch: int = 32):
        self.model, self.tokenizer, self.batch = model, tokenizer, batch
        self._stop_masks: dict[tuple[str, ...], tuple[jax.Array, bool]] = {}

    def count(self, text: str) -> int:
        """Tokens of a text, without BOS."""
        return len(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def prefix(self, params: trees.Tree, text: str) -> Prefix:
        """Computes the cache of a shared beginning (BOS and `text`)."""
        ids = self.tokenizer.encode(text).ids
        tokens_1xT, length_1 = _pad([ids], 1)
        _, cache = prefill(self.model, params, tokens_1xT, length_1, None, jnp.int32(0), n_free=0)
        return Prefix(text, len(ids), cache)

    def generate(
        self,
        params: trees.Tree,
        prompts: Sequence[str],
        sampling: Sampling,
        prefix: Prefix | None = None,
        on_progress: Callable[[int], None] = lambda n: None,
    ) -> list[Generation]:
        """Completes each prompt; the answers come back in the order of the prompts.

        With a `prefix` the prompts go on where it ends and carry no BOS. `on_progress(n)` is told of every n prompts done.
        Raises `UserError` for a prompt that with its reply would not fit into the model's context.
        """
        ids = [self.tokenizer.encode(p, add_special_tokens=prefix is None).ids for p in prompts]
        n_prefix = prefix.n_tokens if prefix else 0
        for prompt, tokens in zip(prompts, ids, strict=True):
            total = n_prefix + len(tokens) + sampling.max_new_tokens
            if not tokens:
                raise UserError("an empty prompt has nothing to complete")
            if total > self.model.config.max_length:
                limit = self.model.config.max_length
                raise UserError(f"prompt '{prompt[:40]}...' needs {total} tokens with its reply, the model's context has {limit}")
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        replies: list[Generation | None] = [None] * len(ids)
        for at in range(0, len(order), self.batch):
            chosen = order[at : at + self.batch]
            for i, reply in zip(chosen, self._batch(params, [ids[i] for i in chosen], sampling, prefix), strict=True):
                replies[i] = reply
            on_progress(len(chosen))
        return [reply for reply in replies if reply is not None]

    def _batch(self, params: trees.Tree, ids: list[list[int]], sampling: Sampling, prefix: Prefix | None) -> list[Generation]:
        tokens_BxT, length_B = _pad(ids, 1 << (len(ids) - 1).bit_length())
        stops_V, every_stop_is_a_token = self._stops(sampling.stop)
        start = jnp.int32(prefix.n_tokens if prefix else 0)
        past = prefix.cache if prefix else None
        began = time.perf_counter()
        # The last token needs no slot; rounding keeps one program for nearby reply lengths.
        last_BxD, cache = prefill(self.model, params, tokens_BxT, length_B, past, start, n_free=-(-sampling.max_new_tokens // 8) * 8)
        state = first_token(self.model, params, last_BxD, length_B, start, stops_V, sampling)
        jax.block_until_ready((state, cache))
        filled = time.perf_counter()
        # A stop string may be spread over several tokens; those are looked for here, every few tokens.
        stride = sampling.max_new_tokens if every_stop_is_a_token else 16
        for limit in range(stride, sampling.max_new_tokens + stride, stride):
            state, cache = decode(self.model, params, state, cache, stops_V, jnp.int32(min(limit, sampling.max_new_tokens)), sampling)
            out_BxN = np.asarray(state["out"])
            replies = [self._cut(row[: int(state["step"])], stops_V, sampling.stop) for row in out_BxN[: len(ids)]]
            state["done"] = jnp.asarray(
                [bool(done) or i >= len(ids) or replies[i][2] for i, done in enumerate(np.asarray(state["done"]))]
            )
            if bool(jnp.all(state["done"])):
                break
        ended = time.perf_counter()
        cached = prefix.n_tokens if prefix else 0
        return [
            Generation(text, tokens, cached + len(row), cached, filled - began, ended - filled)
            for row, (text, tokens, _) in zip(ids, replies, strict=True)
        ]

    def _cut(self, row: np.ndarray, stops_V: np.ndarray, stop: tuple[str, ...]) -> tuple[str, tuple[int, ...], bool]:
        """(text up to the first stop string, tokens made for it, whether it was stopped)."""
        tokens = []
        for token in row.tolist():
            tokens.append(token)
            if self._stops_host(stop)[token]:
                break
        text = self.tokenizer.decode(tokens)
        ends = [at for s in stop if (at := text.find(s)) >= 0]
        return text[: min(ends)] if ends else text, tuple(tokens), bool(ends)

    def _stops_host(self, stop: tuple[str, ...]) -> np.ndarray:
        self._stops(stop)
        return self._stop_masks[stop][2]

    def _stops(self, stop: tuple[str, ...]):
        """(mask over the vocabulary of tokens that end a reply, whether that catches every stop string)."""
        if stop not in self._stop_masks:
            mask = np.zeros(self.model.config.vocab_size, bool)
            mask[self.model.config.eos_id] = True
            for piece, i in self.tokenizer.get_vocab().items():
                if i < mask.size and any(s in piece.replace("▁", " ") for s in stop):
                    mask[i] = True
            self._stop_masks[stop] = (jnp.asarray(mask), all(len(s) == 1 for s in stop), mask)
        mask, covered, _ = self._stop_masks[stop]
        return mask, covered


def _pad(ids: list[list[int]], rows: int) -> tuple[jax.Array, jax.Array]:
    """Tokens `[rows, bucket]` padded on the right and their lengths; missing rows repeat the first."""
    ids = ids + [ids[0]] * (rows - len(ids))
    tokens = np.zeros((rows, bucket(max(map(len, ids)))), np.int32)
    for row, tokens_of_row in zip(tokens, ids, strict=True):
        row[: len(tokens_of_row)] = tokens_of_row
    return jnp.asarray(tokens), jnp.asarray([len(row) for row in ids], jnp.int32)
