"""AdamW, Adafactor or Muon with linear warmup, cosine decay and global-norm clipping; and rounding that keeps small updates alive."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

OPTIMIZERS = ("adamw", "adafactor", "muon")
_NOT_DECAYED = ("scale", "bias", "magnitude")


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
    """True where weight decay applies: matrices, not norms' scales, biases and DoRA's magnitudes (which are stacked to 2-D by layers,
    so shapes do not tell)."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _name(path) not in _NOT_DECAYED, params)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path[-1:], simple=True).split("/")[-1]


def make(
    name: str,
    schedule: optax.Schedule,
    *,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
    momentum_dtype: Any = jnp.float32,
    lora_plus: float = 1.0,
) -> optax.GradientTransformation:
    """Clips the gradient's global norm to `clip_norm`, then one of `OPTIMIZERS`, given float32 gradients and parameters:

    - adamw (Loshchilov & Hutter 2019, arXiv:1711.05101): two moments a parameter, the first in `momentum_dtype`.
    - adafactor (Shazeer & Stern 2018, arXiv:1804.04235): of a matrix the means of its rows and columns only, and no momentum. Of layers
      that are stacked, each has its own means; they are clipped and scaled together.
    - muon (Jordan et al. 2024): one moment in `momentum_dtype`, orthogonalised, layer by layer; scaled to the size of AdamW's updates
      (Liu et al. 2025, arXiv:2502.16982), so that the same learning rates serve. For matrices inside the layers; AdamW for the rest.

    Weight decay is on matrices only. `lora_plus` multiplies the updates of adapters' `b`, decay included, which is a learning rate of
    their own. Raises `KeyError` for another name.
    """
    make_rule = {
        "adamw": lambda: optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=decayed, mu_dtype=momentum_dtype),
        "adafactor": lambda: _adafactor(schedule, weight_decay),
        "muon": lambda: muon(
            schedule,
            mu_dtype=momentum_dtype,
            weight_decay=weight_decay,
            weight_decay_mask=decayed,
            adam_b1=b1,
            adam_b2=b2,
            adam_weight_decay=weight_decay,
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=0.2,
        ),
    }[name]
    return optax.chain(optax.clip_by_global_norm(clip_norm), make_rule(), _faster_b(lora_plus))


def _faster_b(ratio: float) -> optax.GradientTransformation:
    """Of a table of embeddings the half that starts from zero, which `b` is of a kernel, is `a`."""

    def is_faster(path: tuple[Any, ...]) -> bool:
        return _name(path) == ("a" if len(path) > 1 and _name(path[:-1]) == "embedding" else "b")

    def scaled(updates: Any, _: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, update: ratio * update if is_faster(path) else update, updates)

    return optax.identity() if ratio == 1 else optax.stateless(scaled)


def _adafactor(schedule: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    # optax decays weights by `weight_decay_rate` a step, whatever the learning rate: here decay follows it, as in AdamW.
    return optax.chain(
        optax.scale_by_factored_rms(decay_rate=0.8, min_dim_size_to_factor=32),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(weight_decay, decayed),
        optax.scale_by_learning_rate(schedule),
    )


def _matrices(params: Any) -> Any:
    """Muon's matrices: kernels and adapters (the last two axes; those before are layers), not embeddings, scales and biases."""

    def numbers(path: tuple[Any, ...], leaf: Any) -> MuonDimensionNumbers | None:
        return MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1) if _name(path) in ("kernel", "a", "b") else None

    return jax.tree_util.tree_map_with_path(numbers, params)


def round_stochastically(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 -> bfloat16, up or down at random so that the mean is `x` (Gupta et al. 2015, arXiv:1502.02551).

    Rounding to nearest loses every update below half a unit in the last place (1/256 of the weight and less); so rounded, it arrives in
    the mean. What is not finite stays as it is.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    carried = bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)  # carries into the upper half with the right probability
    rounded = jax.lax.bitcast_convert_type((carried >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))
