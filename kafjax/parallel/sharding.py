"""One table from logical axis names to mesh axes, and the shardings that follow from it. What does not fit is an error.

Parameters name their axes where they are declared (`("layers", "embed", "mlp")`); the table turns that into
`PartitionSpec(None, "fsdp", "tensor")`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kafjax.core import trees
from kafjax.core.errors import UserError, nearest
from kafjax.parallel.distributed import spread

RULES: dict[str, str | None] = {
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "head_dim": None,
    "layers": None,
}
BATCH_AXES = ("data", "fsdp")
"""Mesh axes that the rows of a batch are split over."""


def shardings(axes: Mapping[str, Any], abstract: Mapping[str, Any], mesh: Mesh) -> Any:
    """The `NamedSharding` of every parameter.

    Args:
      axes: for each parameter one logical axis name (or None: not split) per dimension, as `model.axes()` gives them.
      abstract: the parameters, or their shapes.

    Raises:
      UserError: naming the parameter and dimension, for an axis that the table lacks, one mesh axis used twice in a parameter, or a
        dimension that its mesh axis does not divide.
    """
    flat_axes = trees.flatten(axes)

    def sharding(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        return NamedSharding(mesh, _spec(path, flat_axes, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, abstract)


def _spec(path: str, flat_axes: Mapping[str, tuple[str | None, ...]], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    if path not in flat_axes:
        raise UserError(f"parameter '{path}' declares no logical axes")
    names = flat_axes[path]
    if len(names) != len(shape):
        raise UserError(f"parameter '{path}' has {len(shape)} dimensions and {len(names)} axis names {names}")
    used: dict[str, int] = {}
    spec: list[str | None] = []
    for dimension, (name, size) in enumerate(zip(names, shape, strict=True)):
        if name is not None and name not in RULES:
            raise UserError(f"parameter '{path}', dimension {dimension}: axis '{name}' has no sharding rule. {nearest(name, RULES)}")
        axis = None if name is None else RULES[name]
        if axis is not None:
            if axis in used:
                raise UserError(f"parameter '{path}': dimensions {used[axis]} and {dimension} both map to mesh axis '{axis}'")
            used[axis] = dimension
            if size % mesh.shape[axis]:
                raise UserError(
                    f"parameter '{path}', dimension {dimension} ('{name}', size {size}) does not divide over "
                    f"mesh axis {axis}:{mesh.shape[axis]}"
                )
        spec.append(axis)
    return PartitionSpec(*spec)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def n_data_shares(mesh: Mesh) -> int:
    """How many parts the rows of a batch are split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def shard(tree: Any, shardings: Any) -> Any:
    """Places arrays where `shardings` (a matching tree, or one for all) wants them; arrays that lie there already are not copied."""
    return jax.device_put(tree, shardings) if jax.process_count() == 1 else spread(tree, shardings)
