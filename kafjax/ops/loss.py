"""Next-token cross entropy against the vocabulary, in chunks: the `[N, V]` logits never exist at
once.

Chunks behind the last place with a weight are skipped, by a loop with a dynamic number of turns
over arrays of one shape.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kafjax.ops.blockwise import soft_cap
from kafjax.ops.linear import LoRAWeight, dot, dot_over_rows, factors


def chunked_cross_entropy(
    hidden_NxD: jax.Array,
    embedding_VxD: jax.Array | LoRAWeight,
    targets_N: jax.Array,
    weights_N: jax.Array,
    chunk: int = 256,
    n_used: jax.Array | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Weighted sum (not mean) of token losses in nats, a float32 scalar.

    `loss = sum_n weights[n] * (logsumexp(h_n E^T) - h_n E^T[target_n])`. The gradients with respect
    to `hidden` and, if it is asked for, `embedding` are computed chunk by chunk together with the
    loss, so the backward pass costs no second product with the vocabulary and at most `chunk * V`
    logits are alive.

    Args:
      hidden_NxD: final hidden states at the predicted places.
      embedding_VxD: output embedding, with or without an adapter; cast to the dtype of `hidden`.
      targets_N: int32 token ids.
      weights_N: float32; 0 masks a place out (padding).
      chunk: places per chunk; N is padded up to a multiple.
      n_used: int32 scalar, places that are computed, rounded up to whole chunks; by default
        `used(weights_N)`. Under `vmap` it must not be mapped, or every branch is computed for every
        chunk.
      cap: bounds the logits (`soft_cap`) before the softmax.
    """
    return summed_and_single_losses(
        hidden_NxD, embedding_VxD, targets_N, weights_N, chunk, n_used, cap
    )[0]


def used(weights_N: jax.Array) -> jax.Array:
    """Counts the places up to the last one with a weight, over the last axis and all before it:
    int32 scalar."""
    return jnp.max(
        jnp.where(weights_N != 0, jnp.arange(1, weights_N.shape[-1] + 1, dtype=jnp.int32), 0)
    )


def even_chunk(n_places: int, most: int) -> int:
    """Places per chunk: at most `most`, few enough to make skipping worthwhile (a quarter of all),
    not below 64.

    Chunks are equal, so that no rows are computed only to fill the last one.
    """
    n_chunks = max(-(-n_places // most), min(4, n_places // 64), 1)
    return -(-n_places // n_chunks)


def summed_and_single_losses(
    hidden_NxD: jax.Array,
    embedding_VxD: jax.Array | LoRAWeight,
    targets_N: jax.Array,
    weights_N: jax.Array,
    chunk: int = 256,
    n_used: jax.Array | None = None,
    cap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`chunked_cross_entropy`, and the weighted losses `[N]` that it sums. Only the sum has a
    gradient."""
    n = hidden_NxD.shape[0]
    chunk = min(chunk, n)
    n_turns = -(-(used(weights_N) if n_used is None else n_used) // chunk)
    padding = -n % chunk
    hidden_NxD = jnp.pad(hidden_NxD, ((0, padding), (0, 0)))
    targets_N, weights_N = jnp.pad(targets_N, (0, padding)), jnp.pad(weights_N, (0, padding))
    hiddens, tables = zip(*factors(hidden_NxD, embedding_VxD), strict=True)
    total, losses_N = _summed_loss(hiddens, tables, targets_N, weights_N, n_turns, chunk, cap)
    return total, jax.lax.stop_gradient(losses_N[:n])


Tables = tuple[jax.Array, ...]


def _over_chunks(
    one_chunk: Any, carry: Any, arrays: Any, chunk: int, n_turns: jax.Array
) -> tuple[Any, Any]:
    """`jax.lax.scan` over the first `n_turns` chunks of `arrays`, `[N, ..]` each; outputs of the
    others are zeros."""
    outputs = jax.eval_shape(one_chunk, carry, jax.tree.map(lambda a: a[:chunk], arrays))[1]
    n = jax.tree.leaves(arrays)[0].shape[0]
    zeros = jax.tree.map(lambda x: jnp.zeros((n, *x.shape[1:]), x.dtype), outputs)

    def turn(i: jax.Array, state: tuple[Any, Any]) -> tuple[Any, Any]:
        carry, outputs = state
        xs = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, i * chunk, chunk), arrays)
        carry, ys = one_chunk(carry, xs)
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=i * chunk, axis=0)
        return carry, jax.tree.map(put, outputs, ys)

    return jax.lax.fori_loop(0, n_turns, turn, (carry, zeros))


def _logits(hiddens: Tables, tables: Tables, cap: float | None) -> jax.Array:
    """The sum over `h_i [C, n_i] @ table_i [V, n_i]^T`, capped: one pair, or two where an adapter
    stands beside the embedding."""

    def product(h: jax.Array, table: jax.Array) -> jax.Array:
        return dot(h, table, 1)

    return soft_cap(functools.reduce(jnp.add, map(product, hiddens, tables)), cap)


def _losses(logits_CxV: jax.Array, targets_C: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Token losses `[C]`, and the softmax as `exps [C, V]` over `totals [C]`."""
    at_targets_C = jnp.take_along_axis(logits_CxV, targets_C[:, None], axis=-1)[:, 0]
    highest_C = jnp.max(logits_CxV, axis=-1)
    exps_CxV = jnp.exp(logits_CxV - highest_C[:, None])
    # Summed as a product: into a reduction XLA on a CPU fuses the exponentials, and computes them a
    # second time in a slow loop.
    ones_V = jnp.ones(exps_CxV.shape[1], jnp.float32)
    totals_C = jnp.matmul(exps_CxV, ones_V, precision=jax.lax.Precision.HIGHEST)
    return highest_C + jnp.log(totals_C) - at_targets_C, exps_CxV, totals_C


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _summed_loss(hiddens, tables, targets_N, weights_N, n_turns, chunk, cap):
    def one_chunk(total, xs):
        hs, targets, weights = xs
        weighted_C = _losses(_logits(hs, tables, cap), targets)[0] * weights
        return total + jnp.sum(weighted_C), weighted_C

    return _over_chunks(one_chunk, jnp.float32(0), (hiddens, targets_N, weights_N), chunk, n_turns)


def _forward(hiddens, tables, targets_N, weights_N, n_turns, chunk, cap):
    is_trained = [table.perturbed for table in tables]
    given = hiddens, tables, targets_N, weights_N, n_turns
    hiddens, tables, targets_N, weights_N, n_turns = jax.tree.map(lambda x: x.value, given)

    def one_chunk(carry, xs):
        total, d_tables = carry
        hs, targets, weights = xs
        logits_CxV = _logits(hs, tables, cap)
        losses_C, exps_CxV, totals_C = _losses(logits_CxV, targets)
        hot_C = weights  # of each target's one-hot part
        if cap is not None:  # the derivative of the cap, by what came out of it
            slopes_CxV = 1 - jnp.square(logits_CxV / cap)
            exps_CxV, hot_C = (
                exps_CxV * slopes_CxV,
                weights * jnp.take_along_axis(slopes_CxV, targets[:, None], axis=-1)[:, 0],
            )
        exps_CxV, scale_C = exps_CxV.astype(hs[0].dtype), weights / totals_C

        # d loss / d logits = weight * (softmax - onehot). The one-hot part is a lookup: only the
        # softmax goes through products, and its denominator is applied to their results. In float32
        # [D, C] is the shape that takes half the time on a CPU where C is small; the barrier keeps
        # XLA from turning it around again. In bfloat16 there is no fast product of that shape.
        def mixed(table):
            if table.dtype != jnp.float32:
                return dot(exps_CxV, table, 0)
            d_h_DxC = jnp.einsum("vd,cv->dc", table, exps_CxV, preferred_element_type=jnp.float32)
            return jax.lax.optimization_barrier(d_h_DxC).T

        def d_hidden(h, table):
            d_h = mixed(table) * scale_C[:, None]
            return (d_h - hot_C[:, None] * table[targets].astype(jnp.float32)).astype(h.dtype)

        def d_table(d, h):
            scaled = (h.astype(jnp.float32) * scale_C[:, None]).astype(h.dtype)
            d += dot_over_rows(exps_CxV, scaled)
            return d.at[targets].add(-hot_C[:, None] * h.astype(jnp.float32))

        d_tables = tuple(
            None if d is None else d_table(d, h) for d, h in zip(d_tables, hs, strict=True)
        )
        weighted_C = losses_C * weights
        return (total + jnp.sum(weighted_C), d_tables), (
            weighted_C,
            tuple(map(d_hidden, hs, tables)),
        )

    d_tables = tuple(
        jnp.zeros(x.shape, jnp.float32) if yes else None
        for x, yes in zip(tables, is_trained, strict=True)
    )
    (total, d_tables), (losses_N, d_hiddens) = _over_chunks(
        one_chunk, (jnp.float32(0), d_tables), (hiddens, targets_N, weights_N), chunk, n_turns
    )
    return (total, losses_N), (d_hiddens, d_tables)


def _backward(chunk, cap, saved, cotangents):
    d_hiddens, d_tables = saved
    cotangent, _ = cotangents
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None, None
    dtype = d_hiddens[0].dtype
    d_hiddens, d_tables = jax.tree.map(
        lambda d: (d * cotangent).astype(dtype), (d_hiddens, d_tables)
    )
    return d_hiddens, d_tables, None, None, None


_summed_loss.defvjp(_forward, _backward, symbolic_zeros=True)
