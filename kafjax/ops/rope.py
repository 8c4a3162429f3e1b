"""Rotary position embedding (Su et al. 2021), in the rotate-half layout of Hugging Face checkpoints."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Llama3Stretch:
    """Llama 3.1's selection of the frequencies that its factor divides (Llama Team 2024, arXiv:2407.21783, and its `config.json`).

    A wave that turns `high` times or more within `original_length` tokens keeps its frequency, one that turns `low` times or
    less is divided by the factor, and between them the share that is kept rises linearly with the turns.
    """

    low: float
    high: float
    original_length: int


def rope_angles(
    positions_BxT: jax.Array,
    head_dim: int,
    theta: jax.Array | float,
    factor: jax.Array | float = 1.0,
    stretch: Llama3Stretch | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, each float32 `[B, T, 1, head_dim / 2]`.

    `factor` divides all frequencies (linear scaling of positions), or those that `stretch` selects.
    """
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequency = 1.0 / (jnp.asarray(theta, jnp.float32) ** exponent)
    if stretch is None:
        frequency = frequency / factor
    else:
        turns = stretch.original_length * frequency / (2 * math.pi)
        kept = jnp.clip((turns - stretch.low) / (stretch.high - stretch.low), 0, 1)
        frequency = frequency * (kept + (1 - kept) / factor)
    angles = positions_BxT.astype(jnp.float32)[..., None, None] * frequency
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BxTxHxD: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates each pair `(x[i], x[i + D/2])` by its angle, in float32; the dtype of `x` is kept."""
    cos, sin = angles
    first, second = jnp.split(x_BxTxHxD.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BxTxHxD.dtype)
