"""Text in, text out: batches prompts by length, runs prefill and decode, cuts replies at stop
strings, keeps the time."""

from __future__ import annotations

import dataclasses
import itertools
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tokenizers import Tokenizer

from kafjax import lora
from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.core.progress import Advance, unshown
from kafjax.generation.branches import n_shared, prefill_branches
from kafjax.generation.decode import STRIDE, bucket, decode, first_token, prefill
from kafjax.generation.likelihood import reply_log_likelihoods
from kafjax.generation.sample import Sampling
from kafjax.generation.stops import Stops
from kafjax.hub.text import Prompt, check_ids, content, continued, prompt_ids
from kafjax.models import Cache, Decoder
from kafjax.parallel import Constrain, replicated, shard

BATCH_TOKENS = 8192
LIKELIHOOD_ROWS = 8
"""Replies that are weighed at a time: each of their tokens needs a row of logits."""


@dataclasses.dataclass(frozen=True)
class Prefix:
    """The beginning of a prompt that many share, computed once. `n_tokens` slots of `cache` are
    filled.

    The cache has one row, or one for each adapter that it was computed with. `weights` are the
    arrays that it was computed with; it is invalid for any others.
    """

    text: Prompt
    n_tokens: int
    cache: Cache
    weights: tuple[Any, ...] = ()

    def check(self, params: trees.Tree) -> None:
        """Raises `UserError` unless `params` are the very arrays that the prefix was computed
        with."""
        given = jax.tree.leaves(params)
        if len(given) != len(self.weights) or any(
            a is not b() for a, b in zip(given, self.weights, strict=True)
        ):
            raise UserError(
                f"the prefix '{str(self.text)[:40]}...' was computed with other weights or adapters; compute it anew (Generator.prefix)"
            )


@dataclasses.dataclass(frozen=True)
class Generation:
    """A reply and its bill.

    Attributes:
      text: of the reply, up to EOS or a stop string.
      tokens: of the reply, the one that ended it included.
      ended: by EOS or a stop string; False where the limit of tokens cut it.
      prompt_tokens: of all of the prompt; `cached_tokens` of them came from a `Prefix`.
      prefill_seconds, decode_seconds: of the whole batch that the reply was made in.
      prompt: the whole text that was completed, its prefix included; a BOS that plain text is put
        behind is not shown.
    """

    text: str
    tokens: tuple[int, ...]
    ended: bool
    prompt_tokens: int
    cached_tokens: int
    prefill_seconds: float
    decode_seconds: float
    prompt: str = ""

    @property
    def output_tokens(self) -> int:
        return len(self.tokens)


class Generator:
    """Generates with one model and tokenizer; parameters are given at each call, so many sets of
    weights share the programs.

    Up to `batch` prompts are answered at a time, fewer where they would have more than
    `batch_tokens` tokens with their padding. With a `mesh`, on which the parameters have to lie,
    rows are split over `data` and `fsdp` and heads over `tensor`; where its devices are of several
    processes, all of them make the same calls and get the same replies.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        batch: int = 32,
        mesh: Mesh | None = None,
        batch_tokens: int = BATCH_TOKENS,
    ):
        for name, value in (("batch", batch), ("batch_tokens", batch_tokens)):
            if value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        self.model = (
            model if mesh is None else dataclasses.replace(model, constrain=Constrain(mesh))
        )
        self.tokenizer, self.batch, self.mesh, self.batch_tokens = (
            tokenizer,
            batch,
            mesh,
            batch_tokens,
        )
        self._stops: dict[tuple[str, ...], Stops] = {}

    def count(self, text: Prompt) -> int:
        """Counts the tokens of a text, without the BOS that would be put in front of it."""
        return len(
            content(self.tokenizer, text)
            if isinstance(text, str)
            else prompt_ids(self.tokenizer, text)
        )

    def prefix(self, params: trees.Tree, text: Prompt) -> Prefix:
        """Computes the cache of a shared beginning (`text` behind its BOS). Raises `UserError` if
        it is longer than the model's context.

        With slots for adapters in `params` (`lora.lanes.empty_slots`) it is computed with each of
        them: put them there before.
        """
        tokens = self._tokens(text, None, 0)
        weights = tuple(weakref.ref(leaf) for leaf in jax.tree.leaves(params))
        n_slots = lora.lanes.n_slots(params)
        tokens_RxT, length_R = _pad([tokens], n_slots or 1)
        params = lora.lanes.of_rows(params, range(n_slots)) if n_slots else params
        _, cache = prefill(
            self.model,
            params,
            *self._place((tokens_RxT, length_R)),
            None,
            self._place(np.int32(0)),
            n_free=0,
        )
        return Prefix(text, len(tokens), cache, weights)

    def generate(
        self,
        params: trees.Tree,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        prefix: Prefix | None = None,
        advance: Advance = unshown,
        adapters: Sequence[int] | None = None,
    ) -> list[Generation]:
        """Completes each prompt; the answers come back in the order of the prompts.

        With `adapters`, prompt i is completed with the adapter in slot `adapters[i]` of `params`
        (`lora.lanes.empty_slots`): one program, whatever the mix.

        With a `prefix`, made with the same `params`, the prompts go on where it ends and carry no
        BOS. What is drawn for a prompt depends on the seed and its place among the prompts, not on
        the batch. `advance(n)` is told of every n prompts done.

        Raises `UserError` for an empty prompt, for one that with its reply would not fit into the
        model's context, and for a prefix that was computed with other weights.
        """
        if prefix is not None:
            prefix.check(params)
        prompt_tokens = [
            self._tokens(prompt, prefix, sampling.max_new_tokens) for prompt in prompts
        ]
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompt_tokens[i]))
        replies: dict[int, Generation] = {}
        for numbers in batches(
            by_length, [len(tokens) for tokens in prompt_tokens], self.batch, self.batch_tokens
        ):
            of_batch = None if adapters is None else [adapters[i] for i in numbers]
            made = self._batch(
                params, numbers, [prompt_tokens[i] for i in numbers], sampling, prefix, of_batch
            )
            replies.update(zip(numbers, made, strict=True))
            advance(len(numbers))
        return [_with_prompt(replies[i], prefix, prompt) for i, prompt in enumerate(prompts)]

    def generate_branches(
        self,
        params: trees.Tree,
        groups: Sequence[Sequence[Prompt]],
        sampling: Sampling,
        prefix: Prefix | None = None,
        advance: Advance = unshown,
    ) -> list[list[Generation]]:
        """Completes groups of prompts, those of a group with a common beginning, which is computed
        once.

        The longest prompt of a group is its trunk; each branches off where its tokens depart from
        it, and gets the reply that `generate` would give it. `cached_tokens` counts what a prompt
        took from `prefix` and trunk; computed are the longest prompt of each group behind the
        prefix, and `prompt_tokens - cached_tokens` of each. `advance(n)` is told of every n groups.

        Raises:
          UserError: as `generate`.
        """
        if prefix is not None:
            prefix.check(params)
        tokens = [
            [self._tokens(prompt, prefix, sampling.max_new_tokens) for prompt in group]
            for group in groups
        ]
        numbers = list(itertools.accumulate([0, *map(len, tokens)]))  # of each group's first prompt
        by_length = sorted(
            (i for i in range(len(groups)) if tokens[i]), key=lambda i: max(map(len, tokens[i]))
        )
        replies: list[list[Generation]] = [[] for _ in groups]
        longest = max((len(given) for group in tokens for given in group), default=1)
        most = max([1, *map(len, groups)])
        at_a_time = max(1, rows_of(longest, self.batch, self.batch_tokens) // most)
        for at in range(0, len(by_length), at_a_time):
            chosen = by_length[at : at + at_a_time]
            made = iter(
                self._branches(
                    params,
                    [numbers[i] for i in chosen],
                    [tokens[i] for i in chosen],
                    at_a_time,
                    sampling,
                    prefix,
                )
            )
            for i in chosen:
                replies[i] = [_with_prompt(next(made), prefix, prompt) for prompt in groups[i]]
            advance(len(chosen))
        return replies

    def log_likelihoods(
        self,
        params: trees.Tree,
        prompts: Sequence[Prompt],
        replies: Sequence[Sequence[Prompt]],
        prefix: Prefix | None = None,
    ) -> list[list[float]]:
        """Computes the log-likelihood, in nats, of each of some replies to each prompt. Arguments
        and errors are those of `generate`; what ends a reply is part of it."""
        if prefix is not None:
            prefix.check(params)
        rows: list[tuple[int, list[int]]] = []
        for prompt, of_prompt in zip(prompts, replies, strict=True):
            for reply in of_prompt:
                after = continued(self.tokenizer, prompt, reply)
                before = self._tokens(prompt, prefix, len(after))
                check_ids(after, self.model.config.vocab_size, f"reply '{str(reply)[:40]}'")
                rows.append((len(before), [*before, *after]))
        by_length = sorted(range(len(rows)), key=lambda i: len(rows[i][1]))
        n_reply = -(-max((len(row) - first for first, row in rows), default=1) // 8) * 8
        found: dict[int, float] = {}
        lengths = [len(row) for _, row in rows]
        for numbers in batches(by_length, lengths, LIKELIHOOD_ROWS, self.batch_tokens):
            found |= zip(
                numbers,
                self._weighed(params, [rows[i] for i in numbers], n_reply, prefix),
                strict=True,
            )
        one = iter(range(len(rows)))
        return [[found[next(one)] for _ in of_prompt] for of_prompt in replies]

    def _weighed(
        self,
        params: trees.Tree,
        rows: list[tuple[int, list[int]]],
        n_reply: int,
        prefix: Prefix | None,
    ) -> list[float]:
        n_rows = rows_of(max(len(row) for _, row in rows), LIKELIHOOD_ROWS, self.batch_tokens)
        tokens_BxT, length_B = _pad([row for _, row in rows], n_rows)
        first_B = np.array(
            [first for first, _ in rows] + [rows[0][0]] * (n_rows - len(rows)), np.int32
        )
        n_cached, past = (prefix.n_tokens, prefix.cache) if prefix else (0, None)
        tokens_BxT, first_B, length_B, start = self._place(
            (tokens_BxT, first_B, length_B, np.int32(n_cached))
        )
        sums_B = reply_log_likelihoods(
            self.model, params, tokens_BxT, first_B, length_B, past, start, n_reply=n_reply
        )
        return np.asarray(sums_B)[: len(rows)].tolist()

    def _branches(
        self,
        params: trees.Tree,
        numbers: list[int],
        groups: list[list[list[int]]],
        at_a_time: int,
        sampling: Sampling,
        prefix: Prefix | None,
    ) -> list[Generation]:
        """Replies to all prompts of some groups, one group after the other."""
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
        tokens_RxT, length_R = self._place(_pad(trunks, at_a_time))
        _, cache = prefill(
            self.model,
            params,
            tokens_RxT,
            length_R,
            past,
            self._place(np.int32(n_cached)),
            n_free=0,
            whole=True,
        )
        tokens_BxT, length_B = _pad(
            [given[kept:] for (_, _, given), kept in zip(flat, shared, strict=True)], n + fill
        )
        trunk_B = np.array([row for row, _, _ in flat] + [flat[0][0]] * fill, np.int32)
        start_B = n_cached + np.array(shared + shared[:1] * fill, np.int32)
        number_B = np.array([number for _, number, _ in flat] + [-1] * fill, np.int32)
        position_B = start_B + length_B
        placed = self._place((tokens_BxT, length_B, trunk_B, start_B, position_B, number_B))
        tokens_BxT, length_B, trunk_B, start_B, position_B, number_B = placed
        n_new = -(-sampling.max_new_tokens // STRIDE) * STRIDE
        last_BxD, cache = prefill_branches(
            self.model, params, tokens_BxT, length_B, cache, trunk_B, start_B, n_free=n_new
        )
        replies, filled, ended = self._reply(
            params, last_BxD, cache, position_B, number_B, n, sampling
        )
        return [
            Generation(
                text,
                made,
                has_ended,
                n_cached + len(given),
                n_cached + kept,
                filled - began,
                ended - filled,
            )
            for (_, _, given), kept, (text, made, has_ended) in zip(
                flat, shared, replies, strict=True
            )
        ]

    def _tokens(self, text: Prompt, prefix: Prefix | None, n_after: int) -> list[int]:
        """Encodes a prompt, or what follows a prefix; checks that it fits between those before and
        after it."""
        n_before = prefix.n_tokens if prefix else 0
        tokens = (
            prompt_ids(self.tokenizer, text)
            if prefix is None
            else continued(self.tokenizer, prefix.text, text)
        )
        if not str(text) or not tokens:
            raise UserError("an empty prompt has nothing to complete")
        total, config = n_before + len(tokens) + n_after, self.model.config
        if total > config.max_length:
            reply = " with its reply" if n_after else ""
            raise UserError(
                f"prompt '{str(text)[:40]}...' needs {total} tokens{reply}, the model's context has {config.max_length}"
            )
        check_ids(tokens, config.vocab_size, f"prompt '{str(text)[:40]}...'")
        return tokens

    def _batch(
        self,
        params: trees.Tree,
        numbers: list[int],
        prompt_tokens: list[list[int]],
        sampling: Sampling,
        prefix: Prefix | None,
        adapters: list[int] | None,
    ) -> list[Generation]:
        # Few sizes, so that few programs are compiled; rows that fill up are done from the start.
        most = rows_of(max(map(len, prompt_tokens)), self.batch, self.batch_tokens)
        n, rows = (
            len(numbers),
            next(size for size in (1, min(8, most), most) if size >= len(numbers)),
        )
        tokens_BxT, length_B = _pad(prompt_tokens, rows)
        number_B = np.array(numbers + [-1] * (rows - n), np.int32)
        n_new = -(-sampling.max_new_tokens // STRIDE) * STRIDE
        n_cached, past = (prefix.n_tokens, prefix.cache) if prefix else (0, None)
        if adapters is not None:
            of_rows = np.array(adapters + adapters[:1] * (rows - n), np.int32)
            params = lora.lanes.of_rows(params, of_rows)
            past = jax.tree.map(lambda x_LxRxSxKxD: x_LxRxSxKxD[:, of_rows], past)

        began = time.perf_counter()
        tokens_BxT, length_B, position_B, number_B, start = self._place(
            (tokens_BxT, length_B, n_cached + length_B, number_B, np.int32(n_cached))
        )
        last_BxD, cache = prefill(
            self.model, params, tokens_BxT, length_B, past, start, n_free=n_new
        )
        replies, filled, ended = self._reply(
            params, last_BxD, cache, position_B, number_B, n, sampling
        )
        return [
            Generation(
                text,
                made,
                has_ended,
                n_cached + len(given),
                n_cached,
                filled - began,
                ended - filled,
            )
            for given, (text, made, has_ended) in zip(prompt_tokens, replies, strict=True)
        ]

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
        n_new = -(-sampling.max_new_tokens // STRIDE) * STRIDE
        key = jax.random.wrap_key_data(self._place(_key_data(sampling.seed)))
        state = first_token(
            self.model,
            params,
            last_BxD,
            position_B,
            number_B,
            key,
            stops.mask_V,
            n_new,
            distribution,
        )
        jax.block_until_ready((state, cache))
        filled = time.perf_counter()
        stride = sampling.max_new_tokens if stops.in_one_token else STRIDE
        for limit in range(stride, sampling.max_new_tokens + stride, stride):
            limit = self._place(np.int32(min(limit, sampling.max_new_tokens)))
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
            state = state._replace(done_B=self._place(done_B))
        return replies, filled, time.perf_counter()

    def _place(self, arrays: Any) -> Any:
        """Replicates a tree of arrays on every device."""
        return jax.device_put(arrays) if self.mesh is None else shard(arrays, replicated(self.mesh))

    def _stops_at(self, strings: tuple[str, ...]) -> Stops:
        if strings not in self._stops:
            config = self.model.config
            stops = Stops.of(self.tokenizer, strings, config.vocab_size, *config.end_ids)
            self._stops[strings] = dataclasses.replace(stops, mask_V=self._place(stops.mask_V))
        return self._stops[strings]


def _with_prompt(reply: Generation, prefix: Prefix | None, prompt: Any) -> Generation:
    return dataclasses.replace(
        reply, prompt=str(prompt if prefix is None else prefix.text + prompt)
    )


def rows_of(length: int, batch: int, batch_tokens: int) -> int:
    """Number of prompts of up to `length` tokens that are run at a time: at most `batch`, one at
    least.

    A shape of prompts is a program, so lengths of one bucket have one number of rows.
    """
    return max(1, min(batch, batch_tokens // bucket(length)))


def batches(
    by_length: Sequence[int], lengths: Sequence[int], batch: int, batch_tokens: int
) -> Iterator[list[int]]:
    """Divides prompts, given shortest first by their numbers, into batches of rows that `rows_of`
    allows.

    The padded prompts of a batch have `batch_tokens` tokens at most, unless it is a single one.
    """
    made: list[int] = []
    for i in by_length:
        if made and len(made) >= rows_of(lengths[i], batch, batch_tokens):
            yield made
            made = []
        made.append(i)
    if made:
        yield made


def _key_data(seed: int) -> np.ndarray:
    return np.asarray(jax.random.key_data(jax.random.key(seed)))


def _pad(token_lists: list[list[int]], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `[rows, bucket]` padded on the right and their lengths; missing rows repeat the
    first."""
    token_lists = token_lists + [token_lists[0]] * (rows - len(token_lists))
    tokens = np.zeros((rows, bucket(max(map(len, token_lists)))), np.int32)
    for row, given in zip(tokens, token_lists, strict=True):
        row[: len(given)] = given
    return tokens, np.array([len(given) for given in token_lists], np.int32)
