"""Batched prefill and one compiled decode loop over a key-value cache.

Slot s of the cache holds position s of its row, so rows of different lengths share one program and padding is never seen:
slots at and above a row's next position are masked, and overwritten before they come into sight. Lengths are rounded up
to buckets, so a new prompt length finds its program compiled.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kafjax.core import trees
from kafjax.generation.sample import Sampling, next_token
from kafjax.models import Cache, Decoder

BUCKETS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 16384, 32768)


def bucket(length: int) -> int:
    """The smallest bucket that holds `length`."""
    return next(size for size in BUCKETS if size >= length)


@functools.partial(jax.jit, static_argnames=("model", "n_free"))
def prefill(
    model: Decoder,
    params: trees.Tree,
    tokens_BxT: jax.Array,
    length_B: jax.Array,
    past: Cache | None,
    start: jax.Array,
    n_free: int,
) -> tuple[jax.Array, Cache]:
    """Runs the prompts at once. Returns hidden states `[B, D]` of each row's last token, and the cache.

    Args:
      tokens_BxT: int32, padded on the right; `length_B` tokens of each row are real.
      past: cache of a prefix shared by all rows, batch 1, of which `start` slots are filled; None without a prefix.
      start: position of the first new token.
      n_free: slots left empty for the tokens to come.
    """
    B, T = tokens_BxT.shape
    positions_BxT = jnp.broadcast_to(start + jnp.arange(T, dtype=jnp.int32), (B, T))
    if past is not None:
        past = jax.tree.map(lambda x: jnp.broadcast_to(x, (x.shape[0], B, *x.shape[2:])), past)
    hidden_BxTxD, new = model.hidden(params, tokens_BxT, positions_BxT, past=past)
    last_BxD = jnp.take_along_axis(hidden_BxTxD, (length_B - 1)[:, None, None], axis=1)[:, 0]

    def join(new_LxBxTxKxD, past_LxBxSxKxD):
        n_past = 0 if past_LxBxSxKxD is None else past_LxBxSxKxD.shape[2]
        L, _, _, K, Dh = new_LxBxTxKxD.shape
        cache = jnp.zeros((L, B, n_past + T + n_free, K, Dh), new_LxBxTxKxD.dtype)
        if past_LxBxSxKxD is not None:
            cache = cache.at[:, :, :n_past].set(past_LxBxSxKxD)
        return jax.lax.dynamic_update_slice(cache, new_LxBxTxKxD, (0, 0, start, 0, 0))

    return last_BxD, {name: join(new[name], None if past is None else past[name]) for name in new}


@functools.partial(jax.jit, static_argnames=("model", "sampling"))
def first_token(
    model: Decoder, params: trees.Tree, last_BxD: jax.Array, length_B: jax.Array, start: jax.Array, stops_V: jax.Array, sampling: Sampling
) -> dict[str, Any]:
    """The state of the decode loop (without its cache) after the prompt: the first new token and an empty page to write on."""
    key, now = jax.random.split(jax.random.key(sampling.seed))
    token_B = next_token(model.logits(params, last_BxD), now, sampling)
    out_BxN = jnp.full((token_B.shape[0], sampling.max_new_tokens), model.config.eos_id, jnp.int32).at[:, 0].set(token_B)
    return {"key": key, "token": token_B, "position": start + length_B, "done": stops_V[token_B], "out": out_BxN, "step": jnp.int32(1)}


@functools.partial(jax.jit, static_argnames=("model", "sampling"), donate_argnames=("state", "cache"))
def decode(
    model: Decoder,
    params: trees.Tree,
    state: dict[str, Any],
    cache: Cache,
    stops_V: jax.Array,
    limit: jax.Array,
    sampling: Sampling,
) -> tuple[dict[str, Any], Cache]:
    """Decodes until every row is done or `limit` tokens are written: one compiled loop, no host round trip per token.

    `stops_V` is True for tokens that end a reply. A row that is done goes on being computed and keeps writing EOS.
    """
    rows = jnp.arange(state["token"].shape[0])

    def step(carry):
        state, cache = carry
        position_Bx1 = state["position"][:, None]
        hidden, new = model.hidden(params, state["token"][:, None], position_Bx1, past=cache)
        cache = {name: cache[name].at[:, rows, state["position"]].set(new[name][:, :, 0]) for name in cache}
        key, now = jax.random.split(state["key"])
        token_B = next_token(model.logits(params, hidden[:, 0]), now, sampling)
        token_B = jnp.where(state["done"], model.config.eos_id, token_B)
        out_BxN = state["out"].at[:, state["step"]].set(token_B)
        done_B = state["done"] | stops_V[token_B]
        position_B = state["position"] + 1
        return {"key": key, "token": token_B, "position": position_B, "done": done_B, "out": out_BxN, "step": state["step"] + 1}, cache

    def unfinished(carry):
        state, _ = carry
        return (state["step"] < limit) & ~jnp.all(state["done"])

    return jax.lax.while_loop(unfinished, step, (state, cache))
