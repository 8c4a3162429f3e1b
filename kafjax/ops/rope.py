"""Rotary position embedding (Su et al. 2021), in the rotate-half layout of Hugging Face checkpoints."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rope_angles(
    positions_BxT: jax.Array, head_dim: int, theta: jax.Array | float, factor: jax.Array | float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, each float32 `[B, T, 1, head_dim / 2]`; `factor` divides the positions (linear scaling)."""
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    inverse_frequency = 1.0 / (jnp.asarray(theta, jnp.float32) ** exponent) / factor
    angles = positions_BxT.astype(jnp.float32)[..., None, None] * inverse_frequency
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BxTxHxD: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates each pair `(x[i], x[i + D/2])` by its angle, in float32; the dtype of `x` is kept."""
    cos, sin = angles
    first, second = jnp.split(x_BxTxHxD.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BxTxHxD.dtype)
