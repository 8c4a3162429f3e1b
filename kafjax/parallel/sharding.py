"""One table from logical axis names to mesh axes, and the shardings that follow from it. What does
not fit is an error.

Parameters name their axes where they are declared (`("layers", "embed", "mlp")`); the table turns
that into `PartitionSpec(None, "fsdp", "tensor")`. Activations name theirs where they are computed
(`("batch", "length", "heads")`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kafjax.core import trees
from kafjax.core.errors import UserError, nearest
from kafjax.parallel.distributed import spread

RULES: dict[str, str | tuple[str, ...] | None] = {
    "lanes": "lane",
    "batch": ("data", "fsdp"),
    "length": "sequence",
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "experts": "fsdp",
    "head_dim": None,
    "layers": None,
}
BATCH_AXES = RULES["batch"]
"""Mesh axes that the rows of a batch are split over."""
Axes = tuple[str | None, ...]
"""Logical axes of an array, one a dimension; None for one that is not split."""


@dataclasses.dataclass(frozen=True)
class Constrain:
    """`constrain(x, axes)` is `x`, laid over `mesh` as its logical axes say. Without a mesh, and on
    one device, it is `x` as it lies.

    A dimension that its mesh axes do not divide is left whole. Raises `KeyError` for an axis
    without a rule.
    """

    mesh: Mesh | None = None

    @property
    def is_split(self) -> bool:
        return self.mesh is not None and self.mesh.size > 1

    @property
    def platform(self) -> str:
        """Platform of the devices that a program is made for."""
        return jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform

    def spec(self, shape: Sequence[int], axes: Axes) -> PartitionSpec:
        """Returns the place on the mesh of an array of this shape."""
        mesh = cast(Mesh, self.mesh)
        rules = [None if name is None else RULES[name] for name in axes]
        return PartitionSpec(
            *(
                rule if size % _product(mesh, rule) == 0 else None
                for rule, size in zip(rules, shape, strict=True)
            )
        )

    def __call__(self, x: jax.Array, axes: Axes) -> jax.Array:
        if not self.is_split:
            return x
        place = NamedSharding(cast(Mesh, self.mesh), self.spec(x.shape, axes))
        return jax.lax.with_sharding_constraint(x, place)


ONE_DEVICE = Constrain()


def shardings(axes: Mapping[str, Any], abstract: Mapping[str, Any], mesh: Mesh) -> Any:
    """The `NamedSharding` of every parameter.

    Args:
      axes: for each parameter one logical axis name (or None: not split) per dimension, as
        `model.axes()` gives them.
      abstract: the parameters, or their shapes. A parameter of several arrays (a quantised kernel:
        integers and scales) has a sharding for each: that of the parameter, except that dimensions
        stay whole where the array is smaller and its mesh axis does not divide it.

    Raises:
      UserError: naming the parameter and dimension, for an axis that the table lacks, one mesh axis
        used twice in a parameter, or a dimension that its mesh axis does not divide.
    """
    flat_axes = trees.flatten(axes)

    def sharding(keys: tuple[Any, ...], leaf: Any) -> Any:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        spec = _spec(path, flat_axes, leaf.shape, mesh)

        def fits(shape: tuple[int, ...]) -> list[Any]:
            return [
                rule if n % _product(mesh, rule) == 0 else None
                for n, rule in zip(shape, spec, strict=True)
            ]

        return jax.tree.map(
            lambda array: NamedSharding(mesh, PartitionSpec(*fits(array.shape))), leaf
        )

    return jax.tree_util.tree_map_with_path(
        sharding, abstract, is_leaf=lambda node: hasattr(node, "shape")
    )


def _spec(
    path: str, flat_axes: Mapping[str, tuple[str | None, ...]], shape: tuple[int, ...], mesh: Mesh
) -> PartitionSpec:
    if path not in flat_axes:
        raise UserError(f"parameter '{path}' declares no logical axes")
    names = flat_axes[path]
    if len(names) != len(shape):
        raise UserError(
            f"parameter '{path}' has {len(shape)} dimensions and {len(names)} axis names {names}"
        )
    used: dict[str, int] = {}
    spec: list[Any] = []
    for dimension, (name, size) in enumerate(zip(names, shape, strict=True)):
        if name is not None and name not in RULES:
            raise UserError(
                f"parameter '{path}', dimension {dimension}: axis '{name}' has no sharding rule. {nearest(name, RULES)}"
            )
        rule = None if name is None else RULES[name]
        for axis in (rule,) if isinstance(rule, str) else rule or ():
            if axis in used:
                raise UserError(
                    f"parameter '{path}': dimensions {used[axis]} and {dimension} both map to mesh axis '{axis}'"
                )
            used[axis] = dimension
            if size % mesh.shape[axis]:
                raise UserError(
                    f"parameter '{path}', dimension {dimension} ('{name}', size {size}) does not divide over "
                    f"mesh axis {axis}:{mesh.shape[axis]}"
                )
        spec.append(rule)
    return PartitionSpec(*spec)


def _product(mesh: Mesh, rule: str | tuple[str, ...] | None) -> int:
    return math.prod(
        mesh.shape[axis] for axis in ((rule,) if isinstance(rule, str) else rule or ())
    )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def n_data_shares(mesh: Mesh) -> int:
    """Number of parts that the rows of a batch are split into."""
    return _product(mesh, BATCH_AXES)


def shard(tree: Any, shardings: Any) -> Any:
    """Places arrays by `shardings` (a matching tree, or one for all). Arrays that are placed so
    already are not copied.

    Abstract arrays stay abstract and get their sharding, for compilation ahead of time.
    """
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree)):
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, shardings
        )
    return jax.device_put(tree, shardings) if jax.process_count() == 1 else spread(tree, shardings)
