"""Published figures of accelerators, and slices of them by their usual names: v5e-16, v5p-32,
h100-8."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from kafjax.core.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
      flops: dense bfloat16 FLOPs a second.
      memory: bytes.
      memory_bandwidth: bytes a second.
      link_bandwidth: bytes a second to the neighbours over all links at once, one way.
      devices: number of JAX devices per chip.
      dims: dimensions of the torus (0: a switch).
      counted: unit of the number in a slice's name: chips or cores (two to a chip).
      network_bandwidth: bytes a second to other slices."""

    flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float
    dims: int = 0
    counted: str = "chips"
    devices: int = 1
    compiler: str = ""
    network_bandwidth: float = 12.5e9


_GIB = 2**30  # what sells as 16 GB of a TPU is 16 GiB

# TPUs: https://cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e and /tpu7x (links are given there
# both ways: half of it is one way). The data centre's network, a chip: v5e's 6.4 Tbit/s for 256
# chips are published there. The others are assumptions: v4 as v5e, v5p twice, v6e and v7x four
# times that. GPUs: NVIDIA's data sheets of the A100 80GB SXM, H100 SXM, H200 SXM and B200 (dense;
# NVLink, one way).
CHIPS = {
    "v4": Chip(
        275e12,
        32 * _GIB,
        1228e9,
        300e9,
        dims=3,
        counted="cores",
        compiler="v4",
        network_bandwidth=3.1e9,
    ),
    "v5e": Chip(197e12, 16 * _GIB, 819e9, 200e9, dims=2, compiler="v5e", network_bandwidth=3.1e9),
    "v5p": Chip(
        459e12,
        95 * _GIB,
        2765e9,
        600e9,
        dims=3,
        counted="cores",
        compiler="v5p",
        network_bandwidth=6.2e9,
    ),
    "v6e": Chip(918e12, 32 * _GIB, 1638e9, 400e9, dims=2, compiler="v6e"),
    "v7x": Chip(2307e12, 192 * _GIB, 7380e9, 600e9, dims=3, devices=2, compiler="tpu7x"),
    "a100": Chip(312e12, 80e9, 2039e9, 300e9),
    "h100": Chip(989e12, 80e9, 3350e9, 450e9),
    "h200": Chip(989e12, 141e9, 4800e9, 450e9),
    "b200": Chip(2250e12, 180e9, 7700e9, 900e9),
}
UNKNOWN = Chip(50e9, 8e9, 10e9, 1e9)
"""A device that is not in the table, such as a CPU's share: numbers of a core, so that sending is
dear and all else in proportion."""
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "v7x",
}
_LARGEST = {"v4": 4096, "v5e": 256, "v5p": 8192, "v6e": 256, "v7x": 8192}
"""Chips of the largest slice: a power of two here, though v4, v5p and v7x come in a few other
shapes (name those by their shape)."""


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips that are booked together. `shape` is the torus of each slice, () for GPUs; `n_chips`
    are those of all `n_slices`."""

    name: str
    chip: Chip
    n_chips: int
    shape: tuple[int, ...] = ()
    n_slices: int = 1

    @property
    def n_devices(self) -> int:
        return self.n_chips * self.chip.devices

    @property
    def is_tpu(self) -> bool:
        return bool(self.chip.dims)

    @property
    def device(self) -> Chip:
        """The chip's share of one JAX device."""
        c, n = self.chip, self.chip.devices
        return dataclasses.replace(
            c,
            flops=c.flops / n,
            memory=c.memory / n,
            memory_bandwidth=c.memory_bandwidth / n,
            link_bandwidth=c.link_bandwidth / n,
            network_bandwidth=c.network_bandwidth / n,
        )


def parse_slice(name: str) -> Slice:
    """Parses a slice's name: `v5e-16` (16 chips), `v5p-32` (32 cores: 16 chips), `v5e:4x4` and
    `v5p:2x2x4` (chips by their torus), `h100-8`; and `2*v5e-16`, two slices of TPUs joined by the
    data centre's network.

    v4 and v5p are counted in cores, two to a chip, as Cloud TPU does. Raises `UserError` with the
    nearest name for another one.
    """
    count, times, one = name.partition("*")
    if times:
        if not re.fullmatch(r"[1-9]\d{0,3}", count):
            raise UserError(
                f"topology '{name[:60]}': write the number of slices first, as in 2*v5e-16"
            )
        single = parse_slice(one)
        if not single.is_tpu:
            raise UserError(
                f"topology '{name[:60]}': GPUs come in no slices; write {one.partition('-')[0]}-N for all of them"
            )
        return dataclasses.replace(
            single, name=name, n_chips=single.n_chips * int(count), n_slices=int(count)
        )
    known = sorted({f"{kind}-{n}" for kind, chip in CHIPS.items() for n in _numbers(kind, chip)})
    match = re.fullmatch(r"(v5litepod|tpu7x|[a-z]+\d+[a-z]?)([-:])(\d+(?:x\d+)*)", name.lower())
    kind = {"v5litepod": "v5e", "tpu7x": "v7x"}.get(match[1], match[1]) if match else ""
    if not match or kind not in CHIPS:
        raise UserError(
            f"unknown topology '{name}'. {nearest(name.lower(), known) if name else 'For example v5e-16'}"
        )
    chip = CHIPS[kind]
    if match[2] == ":":
        shape = tuple(int(n) for n in match[3].split("x"))
        if len(shape) != chip.dims or min(shape) < 1:
            what = (
                f"{kind} is a torus of {chip.dims} dimensions"
                if chip.dims
                else f"{kind} has no torus; write {kind}-8"
            )
            raise UserError(f"topology '{name}': {what}")
        return Slice(name, chip, _product(shape), shape)
    if "x" in match[3]:
        raise UserError(
            f"topology '{name}': a shape is written {kind}:{match[3]}, a number of {chip.counted} {kind}-N"
        )
    number = int(match[3])
    if number not in _numbers(kind, chip):
        near = min(_numbers(kind, chip), key=lambda n: abs(n - number))
        raise UserError(
            f"unknown topology '{name}': {kind}-N counts {chip.counted}. Did you mean '{kind}-{near}'?"
        )
    n_chips = number // 2 if chip.counted == "cores" else number
    return Slice(name, chip, n_chips, _torus(n_chips, chip.dims))


def chip_of(device: Any) -> Chip | None:
    """Returns the share of a chip that a JAX device has; None if the chip is not in the table (a
    CPU, say)."""
    text = device.device_kind
    kind = _KINDS.get(text) or next(
        (kind for kind in CHIPS if kind in text.lower().split()[1:]), None
    )
    kind = kind or next(
        (kind for kind in ("h100", "h200", "a100", "b200") if kind in text.lower()), None
    )
    return None if kind is None else Slice(kind, CHIPS[kind], 1).device


def _numbers(kind: str, chip: Chip) -> list[int]:
    if not chip.dims:
        return [2**k for k in range(13)]
    smallest = 1 if chip.dims == 2 else 4
    chips = [
        n
        for n in (2**k for k in range(14))
        if smallest <= n <= _LARGEST[kind] and not (chip.dims == 2 and n == 2)
    ]
    return [2 * n if chip.counted == "cores" else n for n in chips]


def _torus(n_chips: int, dims: int) -> tuple[int, ...]:
    """Returns the usual torus of a power of two: as near to a square or a cube as possible, short
    sides first, but four chips a plane."""
    exponent = n_chips.bit_length() - 1
    if dims == 0:
        return ()
    if dims == 3 and exponent == 2:
        return (2, 2, 1)
    return tuple(2 ** ((exponent + i) // dims) for i in range(dims))


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for n in shape:
        product *= n
    return product
