"""Grouped-query attention over new tokens and, when decoding, over a cache of past ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kafjax.core.errors import UserError

ATTENTION = ("xla", "cudnn")
"""Who computes attention among new tokens: XLA, by products whose scores `[B, H, T, T]` are in
memory, or cuDNN's fused kernel on NVIDIA GPUs, where they are not (as in Dao et al. 2022,
arXiv:2205.14135)."""
_MASKED = -1e30  # finite, so that a row with nothing to look at gives a mean instead of NaN


def attend(
    q_BxTxHxD: jax.Array,
    keys: list[jax.Array],
    values: list[jax.Array],
    masks: list[jax.Array],
    scale: float,
    cap: float | None = None,
) -> jax.Array:
    """Softmax attention of `q` over several blocks of keys and values at once. Returns `[B, T, H,
    D]`.

    Each block has `k, v [B, S, K, D]` with H a multiple of K (query head h uses key head h // (H /
    K)), and a boolean mask `[B, T, S]`, True where q may look. Blocks let a cache be read where it
    lies instead of being copied to take the new tokens in. Scores and softmax are float32. Scores
    are bounded by `cap` (`soft_cap`).
    """
    B, T, H, D = q_BxTxHxD.shape
    K = keys[0].shape[2]
    q_BxTxKxGxD = q_BxTxHxD.reshape(B, T, K, H // K, D)
    scores = [
        jnp.where(
            mask[:, None, None],
            soft_cap(
                jnp.einsum("btkgd,bskd->bkgts", q_BxTxKxGxD, k, preferred_element_type=jnp.float32)
                * scale,
                cap,
            ),
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


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """Bounds `x` smoothly: `cap * tanh(x / cap)` (Gemma Team 2024, arXiv:2408.00118), or `x` itself
    without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attend_fused(
    q_BxTxHxD: jax.Array,
    k_BxTxKxD: jax.Array,
    v_BxTxKxD: jax.Array,
    mask_BxTxT: jax.Array,
    scale: float,
) -> jax.Array:
    """`attend` among new tokens by cuDNN, differentiable. Returns `[B, T, H, D]`.

    Raises `UserError` where cuDNN does not compute it: no NVIDIA GPU, float32, heads too large.
    """
    if (backend := jax.default_backend()) != "gpu":
        raise UserError(
            f"cuDNN attention needs an NVIDIA GPU, and JAX runs on {backend}; leave --attention at xla"
        )
    try:
        return jax.nn.dot_product_attention(
            q_BxTxHxD,
            k_BxTxKxD,
            v_BxTxKxD,
            mask=mask_BxTxT[:, None],
            scale=scale,
            implementation="cudnn",
        )
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise UserError(
            f"cuDNN does not compute this attention ({error}); try --dtype=bfloat16, or leave --attention at xla"
        ) from error
