"""Batched prefill and one compiled decode loop over a key-value cache.

A slot of the cache follows from the position in its row (`models.caches`), so rows of different
lengths share one program and padding is never kept: slots at and above a row's next position are
masked, and overwritten before they come into sight. Lengths are rounded up to buckets, so a new prompt length finds its program
compiled.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kafjax.core import trees
from kafjax.core.programs import program
from kafjax.generation.sample import Sampling, next_token
from kafjax.models import Cache, Decoder, caches

STRIDE = 16
"""Room for replies comes in steps of so many tokens, and after so many the text is searched for
stop strings."""


class State(NamedTuple):
    """State of the decode loop. `out` holds `step` tokens of each reply and EOS behind them; the
    last token has not been run yet."""

    out_BxN: jax.Array
    step: jax.Array
    position_B: jax.Array
    done_B: jax.Array
    key_B: jax.Array


@program(static=("n_free", "whole"))
def prefill(
    model: Decoder,
    params: trees.Tree,
    tokens_BxT: jax.Array,
    length_B: jax.Array,
    past: Cache | None,
    start: jax.Array,
    n_free: int,
    whole: bool = False,
) -> tuple[jax.Array, Cache]:
    """Runs the prompts at once. Returns hidden states `[B, D]` of each row's last token, and the
    cache.

    Args:
      tokens_BxT: int32, padded on the right; `length_B` tokens of each row are real.
      past: cache of a prefix shared by all rows, batch 1, of which `start` slots are filled; None
        without a prefix.
      start: position of the first new token.
      n_free: slots left empty for the tokens to come.
      whole: sliding layers keep all positions, so that others may branch off (`branches`).
    """
    B, T = tokens_BxT.shape
    positions_BxT = _within(model, jnp.broadcast_to(start + jnp.arange(T, dtype=jnp.int32), (B, T)))
    if past is not None:
        past = jax.tree.map(lambda x: jnp.broadcast_to(x, (x.shape[0], B, *x.shape[2:])), past)
    hidden_BxTxD, new = model.hidden(params, tokens_BxT, positions_BxT, past=past)
    last_BxD = jnp.take_along_axis(hidden_BxTxD, (length_B - 1)[:, None, None], axis=1)[:, 0]

    start_B = jnp.broadcast_to(start, (B,))
    slots = caches.longest(past) + T + n_free
    cache = caches.extended(
        model.config, past, new, start_B, start_B + length_B, slots, whole=whole
    )
    return model.constrain(last_BxD, ("batch", None)), _constrained(model, cache)


@program(static=("n_new", "sampling"))
def first_token(
    model: Decoder,
    params: trees.Tree,
    last_BxD: jax.Array,
    position_B: jax.Array,
    number_B: jax.Array,
    key: jax.Array,
    stops_V: jax.Array,
    n_new: int,
    sampling: Sampling,
) -> State:
    """Returns the state after the prompts: the first token of each reply, and room for `n_new`
    tokens.

    A row's random numbers come from `key` and its number in `number_B`, whatever batch it is in. A
    negative number marks a row that only fills the batch.
    """
    key_B = jax.vmap(jax.random.fold_in, (None, 0))(key, number_B)
    token_B = _draw(model, params, last_BxD, key_B, jnp.int32(0), sampling)
    out_BxN = (
        jnp.full((token_B.shape[0], n_new), model.config.text_end, jnp.int32).at[:, 0].set(token_B)
    )
    return _everywhere(
        model, State(out_BxN, jnp.int32(1), position_B, stops_V[token_B] | (number_B < 0), key_B)
    )


@program(static=("sampling",), donated=("state", "cache"))
def decode(
    model: Decoder,
    params: trees.Tree,
    state: State,
    cache: Cache,
    stops_V: jax.Array,
    limit: jax.Array,
    sampling: Sampling,
) -> tuple[State, Cache]:
    """Decodes until every row is done or `limit` tokens are written: one compiled loop, no host
    round trip per token.

    `stops_V` is True for tokens that end a reply. A finished row is still computed, and writes EOS.
    """

    def step(carry: tuple[State, Cache]) -> tuple[State, Cache]:
        state, cache = carry
        token_Bx1 = jax.lax.dynamic_slice_in_dim(state.out_BxN, state.step - 1, 1, axis=1)
        hidden_Bx1xD, new = model.hidden(
            params, token_Bx1, _within(model, state.position_B)[:, None], past=cache
        )
        cache = caches.written(cache, new, state.position_B)
        token_B = _draw(model, params, hidden_Bx1xD[:, 0], state.key_B, state.step, sampling)
        token_B = jnp.where(state.done_B, model.config.text_end, token_B)
        out_BxN = state.out_BxN.at[:, state.step].set(token_B)
        return State(
            out_BxN,
            state.step + 1,
            state.position_B + 1,
            state.done_B | stops_V[token_B],
            state.key_B,
        ), cache

    def unfinished(carry: tuple[State, Cache]) -> jax.Array:
        state, _ = carry
        return (state.step < limit) & ~jnp.all(state.done_B)

    state, cache = jax.lax.while_loop(unfinished, step, (state, cache))
    return _everywhere(model, state), _constrained(model, cache)


def _within(model: Decoder, positions: jax.Array) -> jax.Array:
    """Bounds positions by the context. Only padding and finished rows lie beyond it, where LongRoPE
    would change all rows' frequencies."""
    return jnp.minimum(positions, model.config.max_length - 1)


def _constrained(model: Decoder, cache: Cache) -> Cache:
    """Constrains the cache to the placement of the activations' rows and heads."""
    return jax.tree.map(
        lambda block: model.constrain(block, (None, "batch", None, "kv_heads", None)), cache
    )


def _everywhere(model: Decoder, state: State) -> State:
    """Replicates a few numbers a row, which the host of every process reads."""
    return State(*(model.constrain(x, (None,) * x.ndim) for x in state))


def _draw(
    model: Decoder,
    params: trees.Tree,
    hidden_BxD: jax.Array,
    key_B: jax.Array,
    step: jax.Array,
    sampling: Sampling,
) -> jax.Array:
    now_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, step)
    return next_token(model.logits(params, hidden_BxD), now_B, sampling)
