"""Grouped-query attention over new tokens and, when decoding, over a cache of past ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp

_MASKED = -1e30  # finite, so that a row with nothing to look at gives a mean instead of NaN


def attend(
    q_BxTxHxD: jax.Array,
    keys: list[jax.Array],
    values: list[jax.Array],
    masks: list[jax.Array],
    scale: float,
) -> jax.Array:
    """Softmax attention of `q` over several blocks of keys and values at once. Returns `[B, T, H, D]`.

    Each block has `k, v [B, S, K, D]` with H a multiple of K (query head h uses key head h // (H / K)), and a boolean
    mask `[B, T, S]`, True where q may look. Blocks let a cache be read where it lies instead of being copied to take
    the new tokens in. Scores and softmax are float32.
    """
    B, T, H, D = q_BxTxHxD.shape
    K = keys[0].shape[2]
    q_BxTxKxGxD = q_BxTxHxD.reshape(B, T, K, H // K, D)
    scores = [
        jnp.where(
            mask[:, None, None],
            jnp.einsum("btkgd,bskd->bkgts", q_BxTxKxGxD, k, preferred_element_type=jnp.float32) * scale,
            _MASKED,
        )
        for k, mask in zip(keys, masks, strict=True)
    ]
    highest = jnp.max(jnp.stack([s.max(axis=-1, keepdims=True) for s in scores]), axis=0)
    weights = [jnp.exp(s - jax.lax.stop_gradient(highest)) for s in scores]
    total = sum(w.sum(axis=-1) for w in weights)
    mixed = sum(
        jnp.einsum("bkgts,bskd->btkgd", w.astype(v.dtype), v, preferred_element_type=jnp.float32)
        for w, v in zip(weights, values, strict=True)
    )
    total_BxTxKxGx1 = jnp.transpose(total, (0, 3, 1, 2))[..., None]
    return (mixed / total_BxTxKxGx1).astype(q_BxTxHxD.dtype).reshape(B, T, H, D)
