"""AdamW, Adafactor or Muon with linear warmup, cosine decay and global-norm clipping; and
stochastic rounding."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

OPTIMIZERS = ("adamw", "adafactor", "muon")
_VECTORS = ("scale", "bias", "magnitude")
_LEAST_FACTORED = 32  # a matrix with a shorter side has nothing to gain from row and column means


def warmup_cosine(
    learning_rate: float, steps: int, *, warmup_fraction: float = 0.05, floor_fraction: float = 0.1
) -> optax.Schedule:
    """Returns the learning rate by step: up linearly over the first `warmup_fraction` of `steps`
    (never from 0, so no step is wasted), then down along a half cosine to `floor_fraction` of the
    peak at the end."""
    warmup = warmup_steps(steps, warmup_fraction)
    return lambda step: rate(step, learning_rate, warmup, steps, floor_fraction)


def warmup_steps(steps: int, fraction: float) -> int:
    return min(round(fraction * steps), steps - 1)


def rate(step: Any, peak: Any, warmup: Any, steps: Any, floor_fraction: float) -> jax.Array:
    """The learning rate of `warmup_cosine` after `step` steps; every argument but the floor may be
    traced, so that one program serves trainings of any rate and length."""
    rising = (step + 1) / (warmup + 1)
    share = jnp.clip((step - warmup) / jnp.maximum(steps - warmup, 1), 0, 1)
    falling = floor_fraction + (1 - floor_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * share))
    return peak * jnp.where(step < warmup, rising, falling)


def decayed(params: Any) -> Any:
    """True where weight decay applies: matrices, not norms' scales, biases and DoRA's
    magnitudes."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _is_matrix(path), params)


def _is_matrix(path: tuple[Any, ...]) -> bool:
    """True for a parameter whose last two axes are a matrix, False for a vector (its last axis).

    Names decide, because shapes cannot: vectors stacked over layers are 2-D. Axes before are
    layers.
    """
    return _name(path) not in _VECTORS


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
    eps: float = 1e-8,
    momentum_dtype: Any = jnp.float32,
    lora_plus: float = 1.0,
) -> optax.GradientTransformation:
    """Clips the gradient's global norm to `clip_norm`, then one of `OPTIMIZERS`, given float32
    gradients and parameters:

    - adamw (Loshchilov & Hutter 2019, arXiv:1711.05101): two moments a parameter, the first in
      `momentum_dtype`.
    - adafactor (Shazeer & Stern 2018, arXiv:1804.04235): a mean per row and per column of each
      matrix, one second moment per entry of each vector, no momentum.
    - muon (Jordan et al. 2024): one moment in `momentum_dtype`, orthogonalised, layer by layer;
      scaled to the size of AdamW's updates (Liu et al. 2025, arXiv:2502.16982), so that the same
      learning rates serve. For matrices inside the layers; AdamW, with Nesterov's momentum, for the
      rest.

    Layers are stacked on leading axes, and every rule treats each layer by itself: no layer's
    gradient enters another's update, except through the global norm that the gradient is clipped
    by.

    `b1`, `b2` and `eps` are AdamW's decay rates and the term in its denominator, also where muon
    leaves a parameter to AdamW; adafactor ignores them.

    Weight decay is on matrices only. `lora_plus` multiplies the updates of adapters' `b`, decay
    included, which is a learning rate of their own. Raises `KeyError` for another name.
    """
    make_rule = {
        "adamw": lambda: optax.adamw(
            schedule,
            b1=b1,
            b2=b2,
            eps=eps,
            weight_decay=weight_decay,
            mask=decayed,
            mu_dtype=momentum_dtype,
        ),
        "adafactor": lambda: _adafactor(schedule, weight_decay),
        "muon": lambda: muon(
            schedule,
            mu_dtype=momentum_dtype,
            weight_decay=weight_decay,
            weight_decay_mask=decayed,
            adam_b1=b1,
            adam_b2=b2,
            eps=eps,
            adam_weight_decay=weight_decay,
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=0.2,
        ),
    }[name]
    return optax.chain(optax.clip_by_global_norm(clip_norm), make_rule(), _faster_b(lora_plus))


def _faster_b(ratio: float) -> optax.GradientTransformation:
    """Multiplies the updates of the zero-initialised half of each adapter: `a` of embedding tables,
    `b` of kernels."""

    def is_faster(path: tuple[Any, ...]) -> bool:
        return _name(path) == ("a" if len(path) > 1 and _name(path[:-1]) == "embedding" else "b")

    def scaled(updates: Any, _: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, update: ratio * update if is_faster(path) else update, updates
        )

    return optax.identity() if ratio == 1 else optax.stateless(scaled)


def _adafactor(schedule: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    # optax decays weights by `weight_decay_rate` a step, whatever the learning rate: here decay
    # follows it, as in AdamW.
    return optax.chain(
        _scale_by_factored_rms(),
        optax.stateless(_clip_layers),
        optax.add_decayed_weights(weight_decay, decayed),
        optax.scale_by_learning_rate(schedule),
    )


class FactoredState(NamedTuple):
    """State of Adafactor's scaling: trees of the parameters' structure, `(1,)` zeros where a tree
    has nothing to keep.

    Attributes:
      count: int32, steps done.
      v_row: float32 `[.., in]`, mean square of each row of a matrix `[.., in, out]`.
      v_col: float32 `[.., out]`, that of each column.
      v: float32, second moments of parameters that are not factored.
    """

    count: jax.Array
    v_row: Any
    v_col: Any
    v: Any


def _scale_by_factored_rms(decay: float = 0.8, eps: float = 1e-30) -> optax.GradientTransformation:
    """Divides by a factored estimate of the gradient's root mean square (Shazeer & Stern 2018,
    algorithms 4 and 5).

    `optax.scale_by_factored_rms` factors the two largest axes, one of which is that of the layers
    in a deep model. Here it is always the last two, and vectors are never factored.
    """

    def is_factored(path: tuple[Any, ...], x: Any) -> bool:
        return _is_matrix(path) and min(x.shape[-2:]) >= _LEAST_FACTORED and x.ndim > 1

    def init(params: Any) -> FactoredState:
        def zeros(shape_if_factored: Any, shape_if_not: Any) -> Any:
            def of(path: tuple[Any, ...], x: Any) -> jax.Array:
                return jnp.zeros(
                    (shape_if_factored if is_factored(path, x) else shape_if_not)(x.shape)
                )

            return jax.tree_util.tree_map_with_path(of, params)

        def nothing(_: tuple[int, ...]) -> tuple[int]:
            return (1,)

        return FactoredState(
            jnp.int32(0),
            v_row=zeros(lambda shape: shape[:-1], nothing),
            v_col=zeros(lambda shape: (*shape[:-2], shape[-1]), nothing),
            v=zeros(nothing, lambda shape: shape),
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, FactoredState]:
        new = (state.count + 1.0) ** -decay  # weight of this step's squares

        def scaled(
            path: tuple[Any, ...], g: Any, row: Any, col: Any, v: Any
        ) -> tuple[Any, Any, Any, Any]:
            square = g * g + eps
            if not is_factored(path, g):
                v += new * (square - v)
                return g * jax.lax.rsqrt(v), row, col, v
            row += new * (jnp.mean(square, -1) - row)
            col += new * (jnp.mean(square, -2) - col)
            row_share = row / jnp.mean(row, -1, keepdims=True)
            return (
                g * jax.lax.rsqrt(row_share)[..., None] * jax.lax.rsqrt(col)[..., None, :],
                row,
                col,
                v,
            )

        results = jax.tree_util.tree_map_with_path(
            scaled, updates, state.v_row, state.v_col, state.v
        )
        scaled_updates, *moments = jax.tree.transpose(
            jax.tree.structure(updates), jax.tree.structure((0,) * 4), results
        )
        return scaled_updates, FactoredState(state.count + 1, *moments)

    return optax.GradientTransformation(init, update)


def _clip_layers(updates: Any, _: Any) -> Any:
    """Bounds the root mean square of the update of each matrix and vector by 1, layer by layer."""

    def clipped(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        axes = tuple(range(-min(2 if _is_matrix(path) else 1, x.ndim), 0))
        return x / jnp.maximum(1, jnp.sqrt(jnp.mean(x * x, axes, keepdims=True)))

    return jax.tree_util.tree_map_with_path(clipped, updates)


def _is_product(name: str) -> bool:
    return name in ("kernel", "a", "b") or name.endswith("_experts")


def _matrices(params: Any) -> Any:
    """Muon's matrices: kernels, experts and adapters (their last two axes), not tables, scales and
    biases."""

    def numbers(path: tuple[Any, ...], leaf: Any) -> MuonDimensionNumbers | None:
        return (
            MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1) if _is_product(_name(path)) else None
        )

    return jax.tree_util.tree_map_with_path(numbers, params)


def round_stochastically(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 -> bfloat16, up or down at random so that the mean is `x` (Gupta et al. 2015,
    arXiv:1502.02551).

    Rounding to nearest loses every update below half a unit in the last place (1/256 of the weight
    and less). Stochastic rounding keeps it in the mean. Values that are not finite are unchanged.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # carries into the upper half with the right probability
    carried = bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((carried >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))
