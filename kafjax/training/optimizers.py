"""AdamW (Loshchilov & Hutter 2019) with linear warmup, cosine decay and global-norm clipping."""

from __future__ import annotations

from typing import Any

import jax
import optax

_NOT_DECAYED = ("scale", "bias")


def warmup_cosine(learning_rate: float, steps: int, *, warmup_fraction: float = 0.05, floor_fraction: float = 0.1) -> optax.Schedule:
    """Learning rate by step: up linearly over the first `warmup_fraction` of `steps` (never from 0, so no step is wasted), then
    down along a half cosine to `floor_fraction` of the peak at the end."""
    warmup = min(round(warmup_fraction * steps), steps - 1)
    return optax.warmup_cosine_decay_schedule(
        init_value=learning_rate / (warmup + 1),
        peak_value=learning_rate,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=floor_fraction * learning_rate,
    )


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
