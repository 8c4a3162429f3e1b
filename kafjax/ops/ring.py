"""Attention whose tokens are split over devices: keys and values go round a ring of them.

Each device keeps its queries and sees one part of the keys at a time, its own first; parts that lie
in its future or before its windows cost nothing but the way (Liu et al. 2023, arXiv:2310.01889).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kafjax.ops.blockwise import (
    NEVER,
    along_of,
    in_blocks,
    in_rows,
    partial_backward,
    partial_forward,
)


def ring_attention(
    q_BxTxHxD: jax.Array,
    k_BxTxKxD: jax.Array,
    v_BxTxKxD: jax.Array,
    segments_BxT: jax.Array | None,
    window: Any,
    scale: float,
    cap: float | None,
    axis: str,
    n: int,
) -> jax.Array:
    """Causal attention `[B, T, H, D]` of this device's T tokens of a row, inside `shard_map`.

    The n devices along the mesh axis `axis` hold the row in order. Other arguments as those of
    `ops.attention.attention`; `window` may be traced.
    """
    both = None if segments_BxT is None else (segments_BxT, segments_BxT)
    q, k, v, ids = in_blocks(q_BxTxHxD, k_BxTxKxD, v_BxTxKxD, both)
    window = jnp.int32(NEVER) if window is None else jnp.asarray(window, jnp.int32)
    out = _ring(q, k, v, ids, window, scale, cap, axis, n, q_BxTxHxD.shape[1])
    return in_rows(out, q_BxTxHxD.shape)


def _part(step: Any, axis: str, n: int, length: int, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Ages of the keys that are here after so many steps, and positions from the first of them up
    to the first query."""
    here = jax.lax.axis_index(axis)
    offset = (here - (here - step) % n) * length
    slots = jnp.arange(k.shape[0] * k.shape[3], dtype=jnp.int32)
    age = jnp.where(slots < length, offset - slots, NEVER)
    return age.reshape(k.shape[0], 1, k.shape[3]), offset


def _passed_on(tree: Any, axis: str, n: int) -> Any:
    ring = [(i, (i + 1) % n) for i in range(n)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, ring), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8, 9))
def _ring(q, k, v, ids, window, scale, cap, axis, n, length):
    return _forward(q, k, v, ids, window, scale, cap, axis, n, length)[0]


def _forward(q, k, v, ids, window, scale, cap, axis, n, length):
    def turn(step, carry):
        out, log_total, (k, v, key_ids) = carry
        age, offset = _part(step, axis, n, length, k)
        segments = None if ids is None else (ids[0], key_ids)
        part, log_part = partial_forward(q, k, v, age, segments, window, offset, scale, cap)
        both = jnp.logaddexp(log_total, log_part)
        out = (
            out * jnp.exp(log_total - both)[..., None] + part * jnp.exp(log_part - both)[..., None]
        )
        return out, both, _passed_on((k, v, key_ids), axis, n)

    nothing = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], -1e30)
    here = k, v, None if ids is None else ids[1]
    out, log_total, _ = jax.lax.fori_loop(0, n, turn, (*nothing, here))
    out = out.astype(q.dtype)
    return out, (q, k, v, ids, window, out, log_total)


def _backward(scale, cap, axis, n, length, saved, d_out):
    q, k, v, ids, window, out, log_total = saved
    along = along_of(out, d_out)

    def turn(step, carry):
        d_q, (k, v, key_ids, d_k, d_v) = carry
        age, offset = _part(step, axis, n, length, k)
        segments = None if ids is None else (ids[0], key_ids)
        more_q, more_k, more_v = partial_backward(
            *(q, k, v, age, segments, window, offset, scale, cap, log_total, along, d_out)
        )
        # the gradients go round with their keys, and are at home after n steps
        here = k, v, key_ids, d_k + more_k, d_v + more_v
        return d_q + more_q, _passed_on(here, axis, n)

    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (q, k, v)]
    here = k, v, None if ids is None else ids[1], zeros[1], zeros[2]
    d_q, (_, _, _, d_k, d_v) = jax.lax.fori_loop(0, n, turn, (zeros[0], here))
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None, None


_ring.defvjp(_forward, _backward)
