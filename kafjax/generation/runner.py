"""Batches of tokens run on devices: prefill, decode until every reply has ended, and the time that
each takes."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tokenizers import Tokenizer

from kafjax import lora
from kafjax.core import trees
from kafjax.generation.batching import padded
from kafjax.generation.branches import n_shared, prefill_branches
from kafjax.generation.decode import STRIDE, decode, first_token, prefill
from kafjax.generation.likelihood import reply_log_likelihoods
from kafjax.generation.prefix import Prefix
from kafjax.generation.reply import Generation
from kafjax.generation.sample import Sampling
from kafjax.generation.stops import Stops
from kafjax.models import Cache, Decoder
from kafjax.parallel import replicated, shard


class Runner:
    """Runs batches of tokens through one model. Each method pads its rows to the number it is
    given, as a number of rows is a program."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, mesh: Mesh | None):
        self.model, self.tokenizer, self.mesh = model, tokenizer, mesh
        self._stops: dict[tuple[str, ...], Stops] = {}

    def cache(self, params: trees.Tree, tokens: list[int]) -> Cache:
        """Computes the cache of one row; with slots for adapters in `params`, a row for each of
        them."""
        n_slots = lora.lanes.n_slots(params)
        tokens_RxT, length_R = padded([tokens], n_slots or 1)
        params = lora.lanes.of_rows(params, range(n_slots)) if n_slots else params
        _, cache = prefill(
            self.model,
            params,
            *self._replicate((tokens_RxT, length_R)),
            None,
            self._replicate(np.int32(0)),
            n_free=0,
        )
        return cache

    def replies(
        self,
        params: trees.Tree,
        numbers: list[int],
        prompt_tokens: list[list[int]],
        most: int,
        sampling: Sampling,
        prefix: Prefix | None,
        adapters: list[int] | None,
    ) -> list[Generation]:
        """Replies to a batch of prompts, of which there may be `most`. `numbers` says which of all
        prompts they are, `adapters` the slot of each."""
        # Few sizes, so that few programs are compiled; rows that fill up are done from the start.
        n, rows = (
            len(numbers),
            next(size for size in (1, min(8, most), most) if size >= len(numbers)),
        )
        tokens_BxT, length_B = padded(prompt_tokens, rows)
        number_B = np.array(numbers + [-1] * (rows - n), np.int32)
        n_cached, past = (prefix.n_tokens, prefix.cache) if prefix else (0, None)
        if adapters is not None:
            of_rows = np.array(adapters + adapters[:1] * (rows - n), np.int32)
            params = lora.lanes.of_rows(params, of_rows)
            past = jax.tree.map(lambda x_LxRxSxKxD: x_LxRxSxKxD[:, of_rows], past)

        began = time.perf_counter()
        tokens_BxT, length_B, position_B, number_B, start = self._replicate(
            (tokens_BxT, length_B, n_cached + length_B, number_B, np.int32(n_cached))
        )
        last_BxD, cache = prefill(
            self.model, params, tokens_BxT, length_B, past, start, n_free=_room(sampling)
        )
        replies, filled, ended = self._reply(
            params, last_BxD, cache, position_B, number_B, n, sampling
        )
        counts = [(n_cached + len(given), n_cached) for given in prompt_tokens]
        return _generations(replies, counts, filled - began, ended - filled)

    def branch_replies(
        self,
        params: trees.Tree,
        numbers: list[int],
        groups: list[list[list[int]]],
        at_a_time: int,
        sampling: Sampling,
        prefix: Prefix | None,
    ) -> list[Generation]:
        """Replies to all prompts of some groups, one group after the other. `numbers` says which of
        all prompts the first of each group is; there may be `at_a_time` groups."""
        trunks = [max(group, key=len) for group in groups]
        flat = [
            (row, number + i, given)
            for row, (number, group) in enumerate(zip(numbers, groups, strict=True))
            for i, given in enumerate(group)
        ]
        shared = [n_shared(given, trunks[row]) for row, _, given in flat]
        n_cached, past = (prefix.n_tokens, prefix.cache) if prefix else (0, None)
        n, fill = len(flat), at_a_time * max(map(len, groups)) - len(flat)
        began = time.perf_counter()
        tokens_RxT, length_R = self._replicate(padded(trunks, at_a_time))
        _, cache = prefill(
            self.model,
            params,
            tokens_RxT,
            length_R,
            past,
            self._replicate(np.int32(n_cached)),
            n_free=0,
            whole=True,
        )
        tokens_BxT, length_B = padded(
            [given[kept:] for (_, _, given), kept in zip(flat, shared, strict=True)], n + fill
        )
        trunk_B = np.array([row for row, _, _ in flat] + [flat[0][0]] * fill, np.int32)
        start_B = n_cached + np.array(shared + shared[:1] * fill, np.int32)
        number_B = np.array([number for _, number, _ in flat] + [-1] * fill, np.int32)
        position_B = start_B + length_B
        placed = self._replicate((tokens_BxT, length_B, trunk_B, start_B, position_B, number_B))
        tokens_BxT, length_B, trunk_B, start_B, position_B, number_B = placed
        last_BxD, cache = prefill_branches(
            self.model,
            params,
            tokens_BxT,
            length_B,
            cache,
            trunk_B,
            start_B,
            n_free=_room(sampling),
        )
        replies, filled, ended = self._reply(
            params, last_BxD, cache, position_B, number_B, n, sampling
        )
        counts = [
            (n_cached + len(given), n_cached + kept)
            for (_, _, given), kept in zip(flat, shared, strict=True)
        ]
        return _generations(replies, counts, filled - began, ended - filled)

    def log_likelihoods(
        self,
        params: trees.Tree,
        rows: list[tuple[int, list[int]]],
        n_rows: int,
        n_reply: int,
        prefix: Prefix | None,
    ) -> list[float]:
        """Weighs the replies in up to `n_rows` rows (where the reply begins, all tokens), of up to
        `n_reply` tokens each, in nats."""
        tokens_BxT, length_B = padded([row for _, row in rows], n_rows)
        first_B = np.array(
            [first for first, _ in rows] + [rows[0][0]] * (n_rows - len(rows)), np.int32
        )
        n_cached, past = (prefix.n_tokens, prefix.cache) if prefix else (0, None)
        tokens_BxT, first_B, length_B, start = self._replicate(
            (tokens_BxT, first_B, length_B, np.int32(n_cached))
        )
        sums_B = reply_log_likelihoods(
            self.model, params, tokens_BxT, first_B, length_B, past, start, n_reply=n_reply
        )
        return np.asarray(sums_B)[: len(rows)].tolist()

    def _reply(
        self,
        params: trees.Tree,
        last_BxD: jax.Array,
        cache: Cache,
        position_B: jax.Array,
        number_B: jax.Array,
        n: int,
        sampling: Sampling,
    ) -> tuple[list[tuple[str, tuple[int, ...], bool]], float, float]:
        """Decodes behind prompts that have been run.

        Returns:
          What `Stops.cut` makes of the first `n` rows, and the times when the first tokens and the
            last ones were there.
        """
        stops, distribution = self._stops_at(sampling.stop), sampling.distribution()
        key = jax.random.wrap_key_data(self._replicate(_key_data(sampling.seed)))
        state = first_token(
            self.model,
            params,
            last_BxD,
            position_B,
            number_B,
            key,
            stops.mask_V,
            _room(sampling),
            distribution,
        )
        jax.block_until_ready((state, cache))
        filled = time.perf_counter()
        stride = sampling.max_new_tokens if stops.in_one_token else STRIDE
        for limit in range(stride, sampling.max_new_tokens + stride, stride):
            limit = self._replicate(np.int32(min(limit, sampling.max_new_tokens)))
            state, cache = decode(
                self.model, params, state, cache, stops.mask_V, limit, distribution
            )
            replies = [
                stops.cut(row) for row in np.asarray(state.out_BxN)[:n, : int(state.step)].tolist()
            ]
            done_B = np.array(state.done_B)
            done_B[:n] |= [ended for _, _, ended in replies]
            if done_B.all():
                break
            state = state._replace(done_B=self._replicate(done_B))
        return replies, filled, time.perf_counter()

    def _replicate(self, arrays: Any) -> Any:
        """Replicates a tree of arrays on every device."""
        return jax.device_put(arrays) if self.mesh is None else shard(arrays, replicated(self.mesh))

    def _stops_at(self, strings: tuple[str, ...]) -> Stops:
        if strings not in self._stops:
            config = self.model.config
            stops = Stops.of(self.tokenizer, strings, config.vocab_size, *config.end_ids)
            self._stops[strings] = dataclasses.replace(stops, mask_V=self._replicate(stops.mask_V))
        return self._stops[strings]


def _generations(
    replies: list[tuple[str, tuple[int, ...], bool]],
    counts: list[tuple[int, int]],
    prefill_seconds: float,
    decode_seconds: float,
) -> list[Generation]:
    """Puts replies (text, tokens, whether they ended) together with the tokens of their prompts, all
    and cached, and the seconds of the batch."""
    return [
        Generation(*reply, *count, prefill_seconds, decode_seconds)
        for reply, count in zip(replies, counts, strict=True)
    ]


def _room(sampling: Sampling) -> int:
    """Counts the slots kept free for a reply."""
    return -(-sampling.max_new_tokens // STRIDE) * STRIDE


def _key_data(seed: int) -> np.ndarray:
    return np.asarray(jax.random.key_data(jax.random.key(seed)))
