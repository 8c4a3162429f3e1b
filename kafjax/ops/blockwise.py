"""Attention by blocks of keys with an online softmax: scores exist for one block at a time, forward
and backward.

The softmax over all keys is made from those of the blocks (Milakov & Gimelshein 2018,
arXiv:1805.02867), and the backward pass computes a block's scores again from the sum that the
forward pass has kept (Dao et al. 2022, arXiv:2205.14135). Blocks that no query may look at, because
they lie in its future or before its window, are not visited.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

BLOCK = 128
"""Queries and keys of a block, unless there are fewer."""
NEVER = 2**30
"""Age of a key that nobody sees, and a window that holds everything else."""
_MASKED = -1e30  # finite, so that a row with nothing to look at gives a mean instead of NaN


def blockwise_attention(
    q_BxTxHxD: jax.Array,
    k_BxSxKxD: jax.Array,
    v_BxSxKxD: jax.Array,
    age_BxS: jax.Array,
    segments: tuple[jax.Array, jax.Array] | None,
    window: jax.Array | int | None,
    offset: jax.Array | int | None,
    scale: float,
    cap: float | None = None,
    block: int = BLOCK,
) -> jax.Array:
    """Softmax attention `[B, T, H, D]`, in the dtype of `q`, with float32 scores and sums.

    Query t sees the keys for which `0 <= t + age < window`. The memory of the gradient is linear in
    T and S.

    Args:
      k_BxSxKxD, v_BxSxKxD: H is a multiple of K, and query head h uses key head `h // (H / K)`.
      age_BxS: int32, positions from each key up to query 0 of its row, or `NEVER` for a key that
        nobody sees; `[1, S]` where all rows are alike.
      segments: ids `[B, T]` and `[B, S]`; queries see keys of their own segment only.
      window: positions that a query sees, itself included; None for all. It may be traced.
      offset: `age[s] == offset - s` for the keys of a text, of which blocks before the window and
        behind the query are then skipped. None where keys lie in no order. It may be traced.
      cap: bound of the scores, `cap * tanh(scores / cap)`; None for none.
    """
    q, k, v, ids = in_blocks(q_BxTxHxD, k_BxSxKxD, v_BxSxKxD, segments, block)
    padding = k.shape[0] * k.shape[3] - age_BxS.shape[1]
    age = jnp.pad(age_BxS, ((0, 0), (0, padding)), constant_values=NEVER)
    age = jnp.moveaxis(age.reshape(age.shape[0], k.shape[0], -1), 1, 0)
    window = jnp.int32(NEVER) if window is None else jnp.asarray(window, jnp.int32)
    offset = None if offset is None else jnp.asarray(offset, jnp.int32)
    return in_rows(_attention(q, k, v, age, ids, window, offset, scale, cap), q_BxTxHxD.shape)


def in_blocks(
    q_BxTxHxD: jax.Array,
    k_BxSxKxD: jax.Array,
    v_BxSxKxD: jax.Array,
    segments: tuple[jax.Array, jax.Array] | None,
    block: int = BLOCK,
) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
    """Queries `[n, B, K, block, G, D]`, keys and values `[n, B, K, block, D]` and segments `[n, B,
    block]`, padded with zeros to whole blocks."""
    B, T, H, D = q_BxTxHxD.shape
    S, K = k_BxSxKxD.shape[1:3]
    bq, bk = min(block, T), min(block, S)

    def cut(x: jax.Array, block: int) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(B, -1, block, *x.shape[2:]), 1, 0)

    def by_head(x: jax.Array, block: int) -> jax.Array:
        return jnp.moveaxis(cut(x, block), 3, 2)

    q = by_head(q_BxTxHxD.reshape(B, T, K, H // K, D), bq)
    ids = segments and (cut(segments[0], bq), cut(segments[1], bk))
    return q, by_head(k_BxSxKxD, bk), by_head(v_BxSxKxD, bk), ids


def in_rows(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`[n, B, K, block, G, D]`, or without the axis G, as `[B, L, H, D]` of this shape."""
    x = jnp.moveaxis(x, (0, 2), (1, 3))
    return x.reshape(shape[0], -1, *shape[2:])[:, : shape[1]]


def _visible(
    i: Any, j: Any, bq: int, age: jax.Array, segments: Any, window: jax.Array
) -> jax.Array:
    """Mask `[B, 1, bq, 1, bk]`, True for the keys of block j that the queries of block i see."""
    t_bqx1 = i * bq + jnp.arange(bq, dtype=jnp.int32)[:, None]
    distance = t_bqx1 + age[j][:, None, :]
    seen = (distance >= 0) & (distance < window)
    if segments is not None:
        seen = seen & (segments[0][i][:, :, None] == segments[1][j][:, None, :])
    return seen[:, None, :, None, :]


def _bounds(
    i: Any, bq: int, bk: int, n_keys: int, window: jax.Array, offset: jax.Array | None
) -> tuple[Any, Any]:
    """The blocks of keys that the queries of block i may see: the first, and the one behind the
    last."""
    if n_keys == 1 or offset is None:
        return 0, n_keys
    first = jnp.maximum((offset + i * bq - window + 1) // bk, 0)
    return first, jnp.clip((offset + (i + 1) * bq + bk - 1) // bk, 0, n_keys)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """Bounds `x` smoothly: `cap * tanh(x / cap)` (Gemma Team 2024, arXiv:2408.00118), or `x` itself
    without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def _scores(q: jax.Array, k: jax.Array, scale: float, cap: float | None) -> jax.Array:
    scores = jnp.einsum("bkqgd,bksd->bkqgs", q, k, preferred_element_type=jnp.float32) * scale
    return soft_cap(scores, cap)


def partial_forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    age: jax.Array,
    segments: Any,
    window: jax.Array,
    offset: jax.Array | None,
    scale: float,
    cap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """Attention over these keys alone, float32 in the form of `q`, and the logarithm of each
    query's sum of exponentials `[n, B, K, block, G]`."""
    bq, bk, n_keys = q.shape[3], k.shape[3], k.shape[0]

    def queries(xs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        i, q_i = xs

        def keys(j: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            mixed, total, highest = carry
            seen = _visible(i, j, bq, age, segments, window)
            scores = jnp.where(seen, _scores(q_i, k[j], scale, cap), _MASKED)
            new = jnp.maximum(highest, jnp.max(scores, axis=-1))
            weights, shrink = jnp.exp(scores - new[..., None]), jnp.exp(highest - new)
            part = jnp.einsum(
                "bkqgs,bksd->bkqgd",
                weights.astype(v.dtype),
                v[j],
                preferred_element_type=jnp.float32,
            )
            return mixed * shrink[..., None] + part, total * shrink + jnp.sum(weights, -1), new

        zeros = jnp.zeros(q_i.shape, jnp.float32)
        start = zeros, zeros[..., 0], jnp.full(q_i.shape[:-1], _MASKED)
        first, stop = _bounds(i, bq, bk, n_keys, window, offset)
        mixed, total, highest = jax.lax.fori_loop(first, stop, keys, start)
        total = jnp.maximum(total, 1e-30)  # 0 where no block was visited
        return mixed / total[..., None], highest + jnp.log(total)

    return jax.lax.map(queries, (jnp.arange(q.shape[0]), q))


def partial_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    age: jax.Array,
    segments: Any,
    window: jax.Array,
    offset: jax.Array | None,
    scale: float,
    cap: float | None,
    log_total: jax.Array,
    along: jax.Array,
    d_out: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients through these keys alone, of queries, keys and values, all float32.

    Args:
      log_total: of all keys that a query sees, not of these alone.
      along: the product of each query's output and its cotangent `d_out`.
    """
    bq, bk, n_keys = q.shape[3], k.shape[3], k.shape[0]

    def queries(d_kv: tuple[jax.Array, jax.Array], xs: tuple[jax.Array, ...]) -> Any:
        i, q_i, log_total_i, along_i, d_out_i = xs

        def keys(j: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            d_q, d_k, d_v = carry
            scores = _scores(q_i, k[j], scale, cap)
            seen = _visible(i, j, bq, age, segments, window)
            weights = jnp.exp(jnp.where(seen, scores, _MASKED) - log_total_i[..., None])
            d_weights = jnp.einsum(
                "bkqgd,bksd->bkqgs", d_out_i, v[j], preferred_element_type=jnp.float32
            )
            d_scores = weights * (d_weights - along_i[..., None]) * scale
            if cap is not None:  # the derivative of the cap, by what came out of it
                d_scores = d_scores * (1 - jnp.square(scores / cap))
            weights, d_scores = weights.astype(v.dtype), d_scores.astype(q.dtype)

            def of_keys(by_key: jax.Array, rows: jax.Array) -> jax.Array:
                return jnp.einsum(
                    "bkqgs,bkqgd->bksd", by_key, rows, preferred_element_type=jnp.float32
                )

            d_q += jnp.einsum(
                "bkqgs,bksd->bkqgd", d_scores, k[j], preferred_element_type=jnp.float32
            )
            d_k, d_v = (
                d_k.at[j].add(of_keys(d_scores, q_i)),
                d_v.at[j].add(of_keys(weights, d_out_i)),
            )
            return d_q, d_k, d_v

        first, stop = _bounds(i, bq, bk, n_keys, window, offset)
        start = jnp.zeros(q_i.shape, jnp.float32), *d_kv
        d_q, d_k, d_v = jax.lax.fori_loop(first, stop, keys, start)
        return (d_k, d_v), d_q

    zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    blocks = jnp.arange(q.shape[0]), q, log_total, along, d_out
    (d_k, d_v), d_q = jax.lax.scan(queries, zeros, blocks)
    return d_q, d_k, d_v


def along_of(out: jax.Array, d_out: jax.Array) -> jax.Array:
    """The product of each query's output and its cotangent, float32."""
    return jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _attention(q, k, v, age, segments, window, offset, scale, cap):
    return _forward(q, k, v, age, segments, window, offset, scale, cap)[0]


def _forward(q, k, v, age, segments, window, offset, scale, cap):
    out, log_total = partial_forward(q, k, v, age, segments, window, offset, scale, cap)
    out = out.astype(q.dtype)
    return out, (q, k, v, age, segments, window, offset, out, log_total)


def _backward(scale, cap, saved, d_out):
    *given, out, log_total = saved
    q, k, v, *_ = given
    d_q, d_k, d_v = partial_backward(*given, scale, cap, log_total, along_of(out, d_out), d_out)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None, None, None, None


_attention.defvjp(_forward, _backward)
