"""Splitting of an NNX module into `(graphdef, params)`: the only place where NNX objects turn into
plain trees."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from kafjax.core import trees


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """An abstract module: `graphdef`, the shapes of its parameters and their logical axes, as plain
    nested dicts.

    With `n_layers` the parameters are those of so many equal layers, stacked on a leading axis
    named "layers".
    """

    graphdef: Any
    abstract: trees.Tree
    axes: trees.Tree

    def module(self, params: Mapping[str, Any]) -> Any:
        """The module with these parameters in it; for use inside a trace."""
        return nnx.merge(self.graphdef, params)


def split(build: Callable[[nnx.Rngs], nnx.Module], n_layers: int | None = None) -> Split:
    """Builds a module abstractly (no memory) and splits it."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    abstract, axes = {}, {}
    for path, variable in nnx.to_flat_state(state):
        name = "/".join(str(part) for part in path)
        value = variable.get_value()
        shape, names = value.shape, tuple(variable.get_metadata()["axes"])
        if n_layers is not None:
            shape, names = (n_layers, *shape), ("layers", *names)
        abstract[name] = jax.ShapeDtypeStruct(shape, value.dtype)
        axes[name] = names
    return Split(graphdef, trees.unflatten(abstract), trees.unflatten(axes))


def random_params(build: Callable[[nnx.Rngs], nnx.Module], key: jax.Array) -> trees.Tree:
    """Freshly initialised parameters of one module as a nested dict; jittable, and vmappable over
    `key`."""
    _, state = nnx.split(build(nnx.Rngs(params=key)))
    return nnx.to_pure_dict(state)
