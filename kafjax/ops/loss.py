"""Next-token cross entropy against the vocabulary, in chunks: the `[N, V]` logits never exist at once."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


def chunked_cross_entropy(
    hidden_NxD: jax.Array, embedding_VxD: jax.Array, targets_N: jax.Array, weights_N: jax.Array, chunk: int = 256
) -> jax.Array:
    """Weighted sum (not mean) of token losses in nats, a float32 scalar.

    `loss = sum_n weights[n] * (logsumexp(h_n E^T) - h_n E^T[target_n])`. The gradients with respect to `hidden` and, if it
    is asked for, `embedding` are computed chunk by chunk together with the loss, so the backward pass costs no
    second product with the vocabulary and at most `chunk * V` logits are alive.

    Args:
      hidden_NxD: final hidden states at the places where the loss looks.
      embedding_VxD: output embedding; cast to the dtype of `hidden`.
      targets_N: int32 token ids.
      weights_N: float32; 0 masks a place out (padding).
      chunk: places per chunk; N is padded up to a multiple.
    """
    return summed_and_single_losses(hidden_NxD, embedding_VxD, targets_N, weights_N, chunk)[0]


def summed_and_single_losses(
    hidden_NxD: jax.Array, embedding_VxD: jax.Array, targets_N: jax.Array, weights_N: jax.Array, chunk: int = 256
) -> tuple[jax.Array, jax.Array]:
    """`chunked_cross_entropy`, and the weighted losses `[N]` that it sums. Only the sum has a gradient."""
    n = hidden_NxD.shape[0]
    chunk = min(chunk, n)
    padding = -n % chunk
    hidden_NxD = jnp.pad(hidden_NxD, ((0, padding), (0, 0)))
    targets_N, weights_N = jnp.pad(targets_N, (0, padding)), jnp.pad(weights_N, (0, padding))
    total, losses_N = _summed_loss(hidden_NxD, embedding_VxD.astype(hidden_NxD.dtype), targets_N, weights_N, chunk)
    return total, jax.lax.stop_gradient(losses_N[:n])


def _chunks(chunk: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(a.reshape(-1, chunk, *a.shape[1:]) for a in arrays)


def _logits(h: jax.Array, embedding_VxD: jax.Array) -> jax.Array:
    return jnp.einsum("cd,vd->cv", h, embedding_VxD, preferred_element_type=jnp.float32)


def _losses(logits_CxV: jax.Array, targets_C: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Token losses `[C]`, and the softmax as `exps [C, V]` over `totals [C]`."""
    at_targets_C = jnp.take_along_axis(logits_CxV, targets_C[:, None], axis=-1)[:, 0]
    highest_C = jnp.max(logits_CxV, axis=-1)
    exps_CxV = jnp.exp(logits_CxV - highest_C[:, None])
    # Summed as a product: into a reduction XLA on a CPU fuses the exponentials, and computes them a second time in a slow loop.
    ones_V = jnp.ones(exps_CxV.shape[1], jnp.float32)
    totals_C = jnp.matmul(exps_CxV, ones_V, precision=jax.lax.Precision.HIGHEST)
    return highest_C + jnp.log(totals_C) - at_targets_C, exps_CxV, totals_C


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _summed_loss(hidden_NxD, embedding_VxD, targets_N, weights_N, chunk):
    def one_chunk(total, xs):
        h, targets, weights = xs
        weighted_C = _losses(_logits(h, embedding_VxD), targets)[0] * weights
        return total + jnp.sum(weighted_C), weighted_C

    total, losses = jax.lax.scan(one_chunk, jnp.float32(0), _chunks(chunk, hidden_NxD, targets_N, weights_N))
    return total, losses.reshape(-1)


def _forward(hidden_NxD, embedding_VxD, targets_N, weights_N, chunk):
    train_embedding = embedding_VxD.perturbed
    hidden_NxD, embedding_VxD, targets_N, weights_N = (x.value for x in (hidden_NxD, embedding_VxD, targets_N, weights_N))

    def one_chunk(carry, xs):
        total, d_embedding = carry
        h, targets, weights = xs
        losses_C, exps_CxV, totals_C = _losses(_logits(h, embedding_VxD), targets)
        exps_CxV, scale_C = exps_CxV.astype(h.dtype), weights / totals_C
        # d loss / d logits = weight * (softmax - onehot). The one-hot part is a lookup: only the softmax goes through products,
        # and its denominator is applied to their results. [D, C] is the shape that takes half the time on a CPU where C is small;
        # the barrier keeps XLA from turning it around again.
        d_h_DxC = jnp.einsum("vd,cv->dc", embedding_VxD, exps_CxV, preferred_element_type=jnp.float32)
        d_h = jax.lax.optimization_barrier(d_h_DxC).T * scale_C[:, None]
        d_h -= weights[:, None] * embedding_VxD[targets].astype(jnp.float32)
        if train_embedding:
            scaled = (h.astype(jnp.float32) * scale_C[:, None]).astype(h.dtype)
            d_embedding += jnp.einsum("cv,cd->vd", exps_CxV, scaled, preferred_element_type=jnp.float32)
            d_embedding = d_embedding.at[targets].add(-weights[:, None] * h.astype(jnp.float32))
        weighted_C = losses_C * weights
        return (total + jnp.sum(weighted_C), d_embedding), (weighted_C, d_h.astype(h.dtype))

    d_embedding = jnp.zeros(embedding_VxD.shape, jnp.float32) if train_embedding else None
    (total, d_embedding), (losses, d_hidden) = jax.lax.scan(
        one_chunk, (jnp.float32(0), d_embedding), _chunks(chunk, hidden_NxD, targets_N, weights_N)
    )
    return (total, losses.reshape(-1)), (d_hidden.reshape(hidden_NxD.shape), d_embedding)


def _backward(chunk, saved, cotangents):
    d_hidden, d_embedding = saved
    cotangent, _ = cotangents
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None
    if d_embedding is not None:
        d_embedding = (d_embedding * cotangent).astype(d_hidden.dtype)
    return (d_hidden * cotangent).astype(d_hidden.dtype), d_embedding, None, None


_summed_loss.defvjp(_forward, _backward, symbolic_zeros=True)
