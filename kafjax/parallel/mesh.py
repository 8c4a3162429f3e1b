"""The device mesh. One device is the trivial mesh, so every program is written for a mesh."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh

from kafjax.core.errors import UserError, nearest

AXES = ("lane", "data", "fsdp", "sequence", "tensor")
"""`lane` splits adapters that train together; `data` splits batches; `fsdp` splits batches and parameters; `sequence` splits the
tokens of a row; `tensor` splits the inside of a layer. In this order, so that the axis that talks most, `tensor`, has the nearest
neighbours."""


def make_mesh(spec: str | Mapping[str, int] = "auto", devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes of `AXES`, all of type Auto (the compiler places collectives).

    Args:
      spec: sizes such as `"data:2,fsdp:4"` or `{"data": 2, "fsdp": 4}`, 1 where not named; `"auto"` puts all devices on
        fsdp (`estimate.choose` knows better, for a given model).
      devices: all devices by default.

    Raises:
      UserError: an unknown axis, or sizes whose product is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = checked({"fsdp": len(devices)} if spec == "auto" else parse(spec) if isinstance(spec, str) else spec, len(devices))
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def checked(sizes: Mapping[str, int], n_devices: int) -> dict[str, int]:
    """`sizes`, if that many devices can be dealt like this; else a `UserError` that offers what can."""
    for axis, size in sizes.items():
        if axis not in AXES:
            raise UserError(f"mesh axis '{axis}' does not exist. {nearest(axis, AXES)}")
        if size < 1:
            raise UserError(f"mesh axis {axis}={size}: sizes start at 1")
    product = math.prod(sizes.values())
    if product != n_devices:
        divisors = ", ".join(str(d) for d in range(1, n_devices + 1) if n_devices % d == 0)
        shown = " x ".join(f"{axis}:{size}" for axis, size in sizes.items()) or "1"
        raise UserError(f"mesh {shown} is {product} devices, there are {n_devices}: choose sizes among its divisors {divisors}")
    return dict(sizes)


def parse(spec: str) -> dict[str, int]:
    """`"data:2,fsdp:4"` -> `{"data": 2, "fsdp": 4}`. Raises `UserError` naming a part that is not `axis:size`, or is there twice."""
    sizes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in spec.split(","))):
        axis, colon, size = part.partition(":")
        if not colon or not size.isdecimal():
            raise UserError(f"mesh '{spec}': '{part}' is not of the form axis:size, for example data:2,fsdp:4 or auto")
        if axis in sizes:
            raise UserError(f"mesh '{spec}': axis '{axis}' is named twice")
        sizes[axis] = int(size)
    return sizes
