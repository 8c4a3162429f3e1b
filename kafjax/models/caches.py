"""Caches of keys and values: as long as the text in full layers, as long as the window in sliding
ones.

    one stack of one kind       {"k": [L, B, S, K, Dh], "v": ...}
    one stack of both kinds     {"full": {"k": ..}, "sliding": {"k": ..}}
    several stacks              {name: {"k": ..}}, without those that share the keys of others

A slot s of S holds the last position so far that is s modulo S. Where the whole text fits that is
position s, else the oldest position makes room for the newest.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kafjax.models.config import DecoderConfig
from kafjax.models.stacks import Stack, blocks, joined
from kafjax.ops.attention import ages

Cache = dict[str, Any]
KINDS = ("full", "sliding")


def is_mixed(cfg: DecoderConfig, stack: Stack) -> bool:
    """True for a stack of layers that slide and layers that do not."""
    return len({cfg.sliding[i] for i in stack.numbers}) == 2


def within_kind(cfg: DecoderConfig) -> np.ndarray:
    """Numbers of the layers among those of their kind, int32 `[L]`."""
    sliding = np.array(cfg.sliding)
    return np.where(sliding, np.cumsum(sliding), np.cumsum(~sliding)).astype(np.int32) - 1


def by_kind(cfg: DecoderConfig, stack: Stack, kv: Any) -> Any:
    """Keys and values of the layers of a stack, `[L, ..]`, as its part of a cache."""
    if kv is None or not is_mixed(cfg, stack):
        return kv

    def chosen(slides: bool) -> Any:
        layers = np.flatnonzero([cfg.sliding[i] == slides for i in stack.numbers])
        return jax.tree.map(lambda x: x[layers], kv)

    return {kind: chosen(bool(slides)) for slides, kind in enumerate(KINDS)}


def shapes(cfg: DecoderConfig, rows: int, slots: int, dtype: Any) -> Cache:
    """Shapes of a cache for `slots` positions."""

    def of_layers(stack: Stack, n_layers: int, sliding: bool) -> Cache:
        n = n_slots(cfg, sliding, slots)
        shape = (n_layers, rows, n, stack.shape.n_kv_heads, stack.shape.head_dim)
        return {name: jax.ShapeDtypeStruct(shape, dtype) for name in ("k", "v")}

    def of_stack(stack: Stack) -> Cache:
        kinds = [cfg.sliding[i] for i in stack.numbers]
        if not is_mixed(cfg, stack):
            return of_layers(stack, len(kinds), kinds[0])
        return {
            kind: of_layers(stack, kinds.count(slides), slides)
            for slides, kind in zip((False, True), KINDS, strict=True)
        }

    return joined({s.name: of_stack(s) for s in _stacks(cfg) if not s.shape.shares_kv})


def n_slots(cfg: DecoderConfig, sliding: bool, slots: int) -> int:
    """Slots of a layer for a text of `slots` positions."""
    return min(slots, cfg.window) if sliding and cfg.window else slots


def longest(cache: Cache | None) -> int:
    """Slots of the layers that keep most; 0 without a cache."""
    return max((x.shape[2] for x in jax.tree.leaves(cache)), default=0)


def extended(
    cfg: DecoderConfig,
    past: Cache | None,
    new: Cache,
    start_B: jax.Array,
    end_B: jax.Array,
    slots: int,
    *,
    whole: bool = False,
) -> Cache:
    """A cache for `slots` positions that holds those below `end_B`: of `new` from `start_B` on, of
    `past` before.

    With `whole` sliding layers keep all positions, too, so that a text may branch off anywhere
    behind `start_B`.
    """

    def join(
        like: jax.ShapeDtypeStruct, new_LxBxTxKxD: jax.Array, *past_LxBxNxKxD: jax.Array
    ) -> jax.Array:
        size = slots if whole else like.shape[2]
        held_BxS = end_B[:, None] - ages(end_B, size)
        at_BxS = jnp.clip(held_BxS - start_B[:, None], 0, new_LxBxTxKxD.shape[2] - 1)
        both = new_LxBxTxKxD
        if past_LxBxNxKxD:
            n_past = past_LxBxNxKxD[0].shape[2]
            is_new = held_BxS >= start_B[:, None]
            at_BxS = jnp.where(is_new, n_past + at_BxS, held_BxS % n_past)
            both = jnp.concatenate((*past_LxBxNxKxD, new_LxBxTxKxD), axis=2)
        return jax.vmap(lambda x, at: x[:, at], in_axes=(1, 0), out_axes=1)(both, at_BxS)

    like = shapes(cfg, end_B.shape[0], slots, jnp.float32)
    return jax.tree.map(join, like, new, *(() if past is None else (past,)))


def written(cache: Cache, new: Cache, position_B: jax.Array) -> Cache:
    """The cache with one new token a row, in place where `cache` is not needed any more."""
    rows = jnp.arange(position_B.shape[0])
    return jax.tree.map(
        lambda block, token: block.at[:, rows, position_B % block.shape[2]].set(token[:, :, 0]),
        cache,
        new,
    )


def _stacks(cfg: DecoderConfig) -> list[Stack]:
    return [stack for block in blocks(cfg) for stack in block]
