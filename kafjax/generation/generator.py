"""Text in, text out: encodes prompts, batches them by length, and puts the replies in order."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from tokenizers import Tokenizer

from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.core.progress import Advance, unshown
from kafjax.generation.batching import BATCH_TOKENS, batches, rows_of
from kafjax.generation.prefix import Prefix
from kafjax.generation.reply import Generation
from kafjax.generation.runner import Runner
from kafjax.generation.sample import Sampling
from kafjax.hub.text import Prompt, check_ids, content, continued, prompt_ids
from kafjax.models import Decoder
from kafjax.parallel import Constrain

LIKELIHOOD_ROWS = 8
"""Replies that are weighed at a time: each of their tokens needs a row of logits."""


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
        self.tokenizer, self.batch, self.batch_tokens = tokenizer, batch, batch_tokens
        self._runner = Runner(self.model, tokenizer, mesh)

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
        return Prefix(text, len(tokens), self._runner.cache(params, tokens), weights)

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
            tokens = [prompt_tokens[i] for i in numbers]
            most = rows_of(max(map(len, tokens)), self.batch, self.batch_tokens)
            made = self._runner.replies(params, numbers, tokens, most, sampling, prefix, of_batch)
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
                self._runner.branch_replies(
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
            chosen = [rows[i] for i in numbers]
            n_rows = rows_of(max(len(row) for _, row in chosen), LIKELIHOOD_ROWS, self.batch_tokens)
            weighed = self._runner.log_likelihoods(params, chosen, n_rows, n_reply, prefix)
            found |= zip(numbers, weighed, strict=True)
        one = iter(range(len(rows)))
        return [[found[next(one)] for _ in of_prompt] for of_prompt in replies]

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


def _with_prompt(reply: Generation, prefix: Prefix | None, prompt: Any) -> Generation:
    return dataclasses.replace(
        reply, prompt=str(prompt if prefix is None else prefix.text + prompt)
    )
