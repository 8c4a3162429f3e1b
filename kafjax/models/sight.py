"""Masks and rotations that the layers of a decoder share, for layers that slide and for those that
do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kafjax.models.config import DecoderConfig
from kafjax.ops.rope import rope_angles

Pair = tuple[Any, Any]
"""(of full layers, of sliding ones); one object twice where both are the same."""


@dataclasses.dataclass(frozen=True)
class Sight:
    """Masks `[B, T, T]` among new tokens and `[B, T, S]` over the cache (None without one),
    rotations, and the growth of queries."""

    masks: Pair
    past_masks: Pair
    angles: Pair
    growth: jax.Array | None

    @classmethod
    def of(
        cls,
        cfg: DecoderConfig,
        positions_BxT: jax.Array,
        segments_BxT: jax.Array | None,
        n_slots: int | None,
    ) -> Sight:
        """Computes them for these positions, with `n_slots` in the cache; tokens see their own
        segment only."""
        return cls(
            masks=_masks(cfg, positions_BxT, segments_BxT),
            past_masks=(None, None)
            if n_slots is None
            else _past_masks(cfg, positions_BxT, n_slots),
            angles=_angles(cfg, positions_BxT),
            growth=None if cfg.query_growth is None else cfg.query_growth.at(positions_BxT),
        )


def pick(pair: Pair, sliding: jax.Array | bool) -> Any:
    """Picks from a pair; where both are the same there is nothing to choose."""
    if isinstance(sliding, bool):
        return pair[sliding]
    return jax.tree.map(lambda a, b: a if a is b else jnp.where(sliding, b, a), *pair)


def _angles(cfg: DecoderConfig, positions_BxT: jax.Array) -> tuple[Any, Any]:
    """(full, sliding) rotations; one and the same where sliding layers have no base of their
    own."""
    rotary_dim = cfg.rotary_dim or cfg.full_head_dim or cfg.head_dim
    full = rope_angles(positions_BxT, rotary_dim, cfg.rope_theta, cfg.rope_factor, cfg.rope_stretch)
    if cfg.rope_theta_sliding is None:
        return full, full
    return full, rope_angles(positions_BxT, cfg.rotary_dim or cfg.head_dim, cfg.rope_theta_sliding)


def _masks(
    cfg: DecoderConfig, positions_BxT: jax.Array, segments_BxT: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """(full, sliding) masks `[B, T, T]` among the new tokens; one and the same where all layers are
    of one kind."""
    T = positions_BxT.shape[1]
    causal = jnp.arange(T)[:, None] >= jnp.arange(T)[None, :]
    full = jnp.broadcast_to(causal, (positions_BxT.shape[0], T, T))
    if segments_BxT is not None:
        full = full & (segments_BxT[:, :, None] == segments_BxT[:, None, :])
    return _with_window(cfg, full, lambda: positions_BxT[:, :, None] - positions_BxT[:, None, :])


def _past_masks(
    cfg: DecoderConfig, positions_BxT: jax.Array, n_slots: int
) -> tuple[jax.Array, jax.Array]:
    """(full, sliding) masks `[B, T, S]` over the cache: slots below the first new position of the
    row are filled."""
    slots = jnp.arange(n_slots)
    full = jnp.broadcast_to(slots < positions_BxT[:, :1, None], (*positions_BxT.shape, n_slots))
    return _with_window(cfg, full, lambda: positions_BxT[:, :, None] - slots)


def _with_window(
    cfg: DecoderConfig, full: jax.Array, distance: Callable[[], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    if not any(cfg.sliding):
        return full, full
    window: Any = cfg.window  # never None where a layer slides
    sliding = full & (distance() < window)
    return (sliding, sliding) if all(cfg.sliding) else (full, sliding)
