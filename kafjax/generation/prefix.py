"""The beginning that many prompts share, with its cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.hub.text import Prompt
from kafjax.models import Cache


@dataclasses.dataclass(frozen=True)
class Prefix:
    """The beginning of a prompt that many share, computed once. `n_tokens` slots of `cache` are
    filled.

    The cache has one row, or one for each adapter that it was computed with. `weights` are the
    arrays that it was computed with; it is invalid for any others.
    """

    text: Prompt
    n_tokens: int
    cache: Cache
    weights: tuple[Any, ...] = ()

    def check(self, params: trees.Tree) -> None:
        """Raises `UserError` unless `params` are the very arrays that the prefix was computed
        with."""
        given = jax.tree.leaves(params)
        if len(given) != len(self.weights) or any(
            a is not b() for a, b in zip(given, self.weights, strict=True)
        ):
            raise UserError(
                f"the prefix '{str(self.text)[:40]}...' was computed with other weights or adapters; compute it anew (Generator.prefix)"
            )
