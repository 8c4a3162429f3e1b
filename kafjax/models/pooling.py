"""Token states to one vector a text: pooling, dense layers and normalisation, as sentence encoders
declare them.

    pooled = pool(hidden_BxTxD, mask_BxT, ("cls", "mean"))      [B, 2D], in the order of the modes
    unit   = normalised(dense(pooled, kernel, bias, "tanh"))

The modes are those of sentence-transformers (Reimers & Gurevych 2019; weightedmean: SGPT,
Muennighoff 2022).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "identity": lambda x: x,
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "sigmoid": jax.nn.sigmoid,
}


def _cls(hidden_BxTxD: jax.Array, mask_BxTx1: jax.Array) -> jax.Array:
    return hidden_BxTxD[:, 0]


def _max(hidden_BxTxD: jax.Array, mask_BxTx1: jax.Array) -> jax.Array:
    return jnp.max(jnp.where(mask_BxTx1 > 0, hidden_BxTxD, -jnp.inf), axis=1)


def _mean(hidden_BxTxD: jax.Array, mask_BxTx1: jax.Array) -> jax.Array:
    return jnp.sum(hidden_BxTxD * mask_BxTx1, axis=1) / jnp.maximum(
        jnp.sum(mask_BxTx1, axis=1), 1e-9
    )


def _mean_sqrt(hidden_BxTxD: jax.Array, mask_BxTx1: jax.Array) -> jax.Array:
    return jnp.sum(hidden_BxTxD * mask_BxTx1, axis=1) / jnp.sqrt(
        jnp.maximum(jnp.sum(mask_BxTx1, axis=1), 1e-9)
    )


def _weighted_mean(hidden_BxTxD: jax.Array, mask_BxTx1: jax.Array) -> jax.Array:
    return _mean(
        hidden_BxTxD,
        mask_BxTx1 * jnp.arange(1, mask_BxTx1.shape[1] + 1, dtype=jnp.float32)[None, :, None],
    )


def _last(hidden_BxTxD: jax.Array, mask_BxTx1: jax.Array) -> jax.Array:
    last_B = jnp.maximum(jnp.sum(mask_BxTx1[..., 0], axis=1).astype(jnp.int32) - 1, 0)
    return jnp.take_along_axis(hidden_BxTxD, last_B[:, None, None], axis=1)[:, 0]


MODES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "cls": _cls,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}


def pool(hidden_BxTxD: jax.Array, mask_BxT: jax.Array, modes: tuple[str, ...]) -> jax.Array:
    """Pools token states float32 over real tokens (`mask` True, on the left of a row); `[B,
    len(modes) * D]`."""
    mask_BxTx1 = mask_BxT[..., None].astype(jnp.float32)
    return jnp.concatenate([MODES[mode](hidden_BxTxD, mask_BxTx1) for mode in modes], axis=-1)


def dense(
    x_BxI: jax.Array, kernel_IxO: jax.Array, bias_O: jax.Array | None, activation: str
) -> jax.Array:
    """Applies a dense layer and its activation; float32 `[B, O]`."""
    y_BxO = x_BxI @ kernel_IxO
    return ACTIVATIONS[activation](y_BxO if bias_O is None else y_BxO + bias_O)


def normalised(x_BxD: jax.Array) -> jax.Array:
    """Scales each row to length 1; a row of zeros stays."""
    return x_BxD / jnp.maximum(jnp.linalg.norm(x_BxD, axis=-1, keepdims=True), 1e-12)
