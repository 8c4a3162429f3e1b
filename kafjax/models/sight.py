"""Inputs that the layers of a decoder share: rotations, those of layers that slide and of those
that do not, and what tokens see of each other."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kafjax.models.config import DecoderConfig
from kafjax.ops.attention import Past, ages
from kafjax.ops.rope import rope_angles

Pair = tuple[Any, Any]
"""(of full layers, of sliding ones); one object twice where both are the same."""


@dataclasses.dataclass(frozen=True)
class Sight:
    """Rotations and growth of queries, segments (None where a row is one text), and the position
    of each row's first new token."""

    angles: Pair
    growth: jax.Array | None
    segments_BxT: jax.Array | None
    next_B: jax.Array

    @classmethod
    def of(
        cls, cfg: DecoderConfig, positions_BxT: jax.Array, segments_BxT: jax.Array | None
    ) -> Sight:
        """Computes them for tokens at these positions; they see their own segment only."""
        return cls(
            angles=_angles(cfg, positions_BxT),
            growth=None if cfg.query_growth is None else cfg.query_growth.at(positions_BxT),
            segments_BxT=segments_BxT,
            next_B=positions_BxT[:, 0],
        )

    def past(self, kv: Any) -> Past | None:
        """The cache `{"k", "v"}` of a layer as attention reads it."""
        return None if kv is None else Past(kv["k"], kv["v"], ages(self.next_B, kv["k"].shape[1]))


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
