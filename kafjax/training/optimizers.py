"""AdamW (Loshchilov & Hutter 2019) with linear warmup, cosine decay and global-norm clipping."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

_NOT_DECAYED = ("scale", "bias")


def warmup_cosine(learning_rate: float, steps: int, *, warmup_fraction: float = 0.05, floor_fraction: float = 0.1) -> optax.Schedule:
    """Learning rate by step: up linearly over the first `warmup_fraction` of `steps` (never from 0, so no step is wasted), then
    down along a half cosine to `floor_fraction` of the peak at the end."""
    warmup = warmup_steps(steps, warmup_fraction)
    return lambda step: rate(step, learning_rate, warmup, steps, floor_fraction)


def warmup_steps(steps: int, fraction: float) -> int:
    return min(round(fraction * steps), steps - 1)


def rate(step: jax.Array, peak: Any, warmup: Any, steps: Any, floor_fraction: float) -> jax.Array:
    """The learning rate of `warmup_cosine` after `step` steps; every argument but the floor may be traced, so that one program
    serves trainings of any rate and length."""
    rising = (step + 1) / (warmup + 1)
    share = jnp.clip((step - warmup) / jnp.maximum(steps - warmup, 1), 0, 1)
    falling = floor_fraction + (1 - floor_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * share))
    return peak * jnp.where(step < warmup, rising, falling)


def decayed(params: Any) -> Any:
    """True where weight decay applies: matrices, not norms' scales and biases (which are stacked to 2-D by layers, so shapes do
    not tell)."""

    def is_matrix(path: tuple[Any, ...], _: Any) -> bool:
        return jax.tree_util.keystr(path[-1:], simple=True).split("/")[-1] not in _NOT_DECAYED

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def adamw(
    schedule: optax.Schedule, *, weight_decay: float = 0.0, clip_norm: float = 1.0, b1: float = 0.9, b2: float = 0.999
) -> optax.GradientTransformation:
    """Clips the gradient's global norm to `clip_norm`, then AdamW; state is two moments a parameter, in its dtype."""
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=decayed),
    )
