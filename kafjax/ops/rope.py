"""Rotary position embedding (Su et al. 2021), in the rotate-half layout of Hugging Face
checkpoints."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Llama3Stretch:
    """Llama 3.1's selection of the frequencies that its factor divides (Llama Team 2024,
    arXiv:2407.21783, and its `config.json`).

    A wave that turns `high` times or more within `original_length` tokens keeps its frequency, one
    that turns `low` times or less is divided by the factor, and between them the share that is kept
    rises linearly with the turns.
    """

    low: float
    high: float
    original_length: int

    def kept(self, frequency_F: jax.Array, theta: float) -> jax.Array:
        """Share of each frequency that is not divided."""
        turns_F = self.original_length * frequency_F / (2 * math.pi)
        return jnp.clip((turns_F - self.low) / (self.high - self.low), 0, 1)


@dataclasses.dataclass(frozen=True)
class YarnStretch:
    """Selects the frequencies that YaRN divides by its factor (Peng et al. 2023, arXiv:2309.00071).

    As in Llama 3.1, but between `slow` and `fast` turns the share that is kept falls linearly with
    the number of the frequency, and queries and keys are multiplied by `attention_factor`.
    `truncate` rounds the first and the last number between outwards.
    """

    slow: float
    fast: float
    original_length: int
    attention_factor: float
    truncate: bool = True

    def kept(self, frequency_F: jax.Array, theta: float) -> jax.Array:
        """Share of each frequency that is not divided."""
        n = 2 * frequency_F.shape[0]
        first, last = (
            n * math.log(self.original_length / (2 * math.pi * turns), theta) / 2
            for turns in (self.fast, self.slow)
        )
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, n - 1)
        return 1 - jnp.clip(
            (jnp.arange(n // 2, dtype=jnp.float32) - first) / ((last - first) or 0.001), 0, 1
        )


@dataclasses.dataclass(frozen=True)
class QueryGrowth:
    """Returns the factor of queries at a position, `1 + beta * log(1 + floor(position / length))`,
    as in Llama 4."""

    beta: float
    length: int

    def at(self, positions_BxT: jax.Array) -> jax.Array:
        """Returns float32 `[B, T, 1, 1]`."""
        return (
            1
            + self.beta
            * jnp.log1p((positions_BxT // self.length).astype(jnp.float32))[..., None, None]
        )


@dataclasses.dataclass(frozen=True)
class LongRope:
    """Divisors of the frequencies, one for each (Ding et al. 2024, arXiv:2402.13753).

    They are `long` where any position lies beyond `original_length`, else `short`. Queries and keys
    are multiplied by `attention_factor`. `longest` is the number of positions that they were made
    for.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_length: int
    attention_factor: float
    longest: int

    def divided(self, frequency_F: jax.Array, positions_BxT: jax.Array) -> jax.Array:
        is_long = jnp.max(positions_BxT) >= self.original_length
        return frequency_F / jnp.where(is_long, jnp.array(self.long), jnp.array(self.short))


@dataclasses.dataclass(frozen=True)
class Proportional:
    """Turns the fastest `share` of the pairs of a whole head, as Gemma 4 does in layers that see
    everything; the others stay."""

    share: float

    def turning(self, frequency_F: jax.Array) -> jax.Array:
        n = int(self.share * 2 * frequency_F.shape[0] // 2)
        return jnp.where(jnp.arange(frequency_F.shape[0]) < n, frequency_F, 0)


Stretch = Llama3Stretch | YarnStretch | LongRope | Proportional


def rope_angles(
    positions_BxT: jax.Array,
    rotary_dim: int,
    theta: float,
    factor: jax.Array | float = 1.0,
    stretch: Stretch | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, each float32 `[B, T, 1, rotary_dim / 2]`.

    `factor` divides all frequencies (linear scaling of positions), or those that `stretch` selects.
    """
    exponent_F = jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim
    frequency_F = 1.0 / (jnp.asarray(theta, jnp.float32) ** exponent_F)
    if isinstance(stretch, LongRope):
        frequency_F = stretch.divided(frequency_F, positions_BxT)
    elif isinstance(stretch, Proportional):
        frequency_F = stretch.turning(frequency_F) / factor
    else:
        kept_F = 0.0 if stretch is None else stretch.kept(frequency_F, theta)
        frequency_F = frequency_F * (kept_F + (1 - kept_F) / factor)
    angles = positions_BxT.astype(jnp.float32)[..., None, None] * frequency_F
    length = stretch.attention_factor if isinstance(stretch, YarnStretch | LongRope) else 1.0
    return length * jnp.cos(angles), length * jnp.sin(angles)


def rotate(x_BxTxHxD: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates each pair `(x[i], x[i + R/2])` of the first R dimensions by its angle, in float32;
    the dtype of `x` is kept.

    R is twice the number of angles: all dimensions, or the rest stays as it is.
    """
    cos, sin = angles
    half = cos.shape[-1]
    first, second, rest = jnp.split(x_BxTxHxD.astype(jnp.float32), [half, 2 * half], axis=-1)
    rotated = jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin, rest], axis=-1
    )
    return rotated.astype(x_BxTxHxD.dtype)
