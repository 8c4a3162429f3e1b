"""The device mesh. One device is the trivial mesh, so every program is written for a mesh."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from kafjax.core.errors import UserError, nearest

AXES = ("lane", "data", "fsdp", "sequence", "tensor")
"""`lane` splits adapters that train together; `data` splits batches; `fsdp` splits batches and
parameters; `sequence` splits the tokens of a row; `tensor` splits the inside of a layer. In this
order, so that the axis that talks most, `tensor`, has the nearest neighbours. Between slices there
is only a slow network, and only `data`, which sends least, crosses it."""


def make_mesh(
    spec: str | Mapping[str, int] = "auto", devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Makes a mesh with the axes of `AXES`, all of type Auto (the compiler places collectives).

    On TPUs the axes are laid along the links of the torus. An axis may take a part of a dimension
    of the torus, or several dimensions.

    Args:
      spec: sizes such as `"data:2,fsdp:4"` or `{"data": 2, "fsdp": 4}`, 1 where not named. `"auto"`
        puts all devices of a slice on fsdp (`estimate.choose` picks better for a given model). With
        several slices, `data:2x4` means 2 slices of 4 each.
      devices: all devices by default.

    Raises:
      UserError: an unknown axis, sizes whose product is not the number of devices, slices that
        `data` does not split, or a mesh that cannot be laid out on the devices' links.
    """
    devices = jax.devices() if devices is None else list(devices)
    n_slices = slices_of(devices)
    if spec == "auto":
        spec = {"data": n_slices, "fsdp": len(devices) // n_slices}
    sizes = checked(parse(spec) if isinstance(spec, str) else spec, len(devices), n_slices)
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    try:
        if n_slices == 1:
            placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        else:
            between = tuple(n_slices if axis == "data" else 1 for axis in AXES)
            within = tuple(n // slow for n, slow in zip(shape, between, strict=True))
            placed = mesh_utils.create_hybrid_device_mesh(
                within, between, devices, allow_split_physical_axes=True
            )
    except (AssertionError, NotImplementedError, ValueError) as error:
        shown = ",".join(f"{axis}:{size}" for axis, size in sizes.items() if size > 1)
        raise UserError(
            f"mesh {shown} cannot be laid along the links of these {len(devices)} devices; choose other sizes"
        ) from error
    return Mesh(np.asarray(placed), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def slices_of(devices: Sequence[jax.Device]) -> int:
    """Counts the slices that devices belong to: TPUs of different slices are joined by the data
    centre's network alone."""
    return (
        len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"})
        or 1
    )


def checked(sizes: Mapping[str, int], n_devices: int, n_slices: int = 1) -> dict[str, int]:
    """Returns `sizes` if they fit the number of devices. Raises a `UserError` that offers sizes
    that do."""
    for axis, size in sizes.items():
        if axis not in AXES:
            raise UserError(f"mesh axis '{axis}' does not exist. {nearest(axis, AXES)}")
        if size < 1:
            raise UserError(f"mesh axis {axis}={size}: sizes start at 1")
    product = math.prod(sizes.values())
    if product != n_devices:
        divisors = ", ".join(str(d) for d in range(1, n_devices + 1) if n_devices % d == 0)
        shown = " x ".join(f"{axis}:{size}" for axis, size in sizes.items()) or "1"
        raise UserError(
            f"mesh {shown} is {product} devices, there are {n_devices}: choose sizes among its divisors {divisors}"
        )
    if sizes.get("data", 1) % n_slices:
        raise UserError(
            f"mesh data:{sizes.get('data', 1)} does not split {n_slices} slices, between which only data may lie; "
            f"write data:{n_slices}x1, or a multiple"
        )
    return dict(sizes)


def parse(spec: str) -> dict[str, int]:
    """Reads `"data:2,fsdp:4"` as `{"data": 2, "fsdp": 4}`, and `"data:2x4"` (slices x devices of
    each) as `{"data": 8}`.

    Raises:
      UserError: naming a part that is not `axis:size`, or is there twice.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in spec.split(","))):
        axis, colon, size = part.partition(":")
        if not colon or not re.fullmatch(
            r"\d{1,7}x\d{1,7}" if axis == "data" and "x" in size else r"\d{1,7}", size
        ):
            raise UserError(
                f"mesh '{spec}': '{part}' is not of the form axis:size, for example data:2,fsdp:4 or auto"
            )
        if axis in sizes:
            raise UserError(f"mesh '{spec}': axis '{axis}' is named twice")
        sizes[axis] = math.prod(map(int, size.split("x")))
    return sizes
