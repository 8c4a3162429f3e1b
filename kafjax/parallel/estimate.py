"""Memory and time that a step needs of each device on a given mesh, by formula; and the choice of a
mesh by those formulas.

A roofline (Williams et al. 2009): each device is busy computing, reading its memory and sending to
its neighbours, and the longest of the three bounds the step from below. Nothing is lost to waiting
here, so a real step takes longer.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

from kafjax.core.errors import UserError
from kafjax.parallel.chips import Chip
from kafjax.parallel.mesh import AXES

Sizes = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Demand:
    """Demand of one step on all devices together, in bytes and FLOPs (two a multiply-add).

    Attributes:
      model_flops: FLOPs that the mathematics needs.
      flops: FLOPs that are computed, recomputation and masked attention included.
      state: bytes of trainable parameters and their optimizer state.
      gradients: bytes of their gradients.
      frozen: bytes of parameters that do not train.
      kernels: bytes of all layers' kernels in the compute dtype; `copied` of those are copies of
        master weights.
      reduced: bytes of gradients that data-parallel devices must add up.
      ends: bytes of the embedding (and the head) in the compute dtype.
      n_layers, rows, seq_len: sizes of the step, which consists of `micro` microbatches.
      residual: bytes of one token's activation between layers.
      kept: bytes of one token and layer kept until the backward pass or the end of the reply; split
        over `tensor` if `kept_is_split`.
      transient: bytes of one token while its layer is computed, attention scores included.
      kv: bytes of one token's keys and values in a layer.
      loss: bytes of a chunk's logits and their temporaries on each device.
      weight_reads: times that a microbatch reads the kernels.
      gathers: times that a microbatch gathers the kernels.
      reduces: all-reduces per layer due to the `tensor` axis, all passes.
      traffic: bytes of memory read and written for one token and layer in all passes.
      limits: for a mesh axis, sizes that it must divide, by name.
      lanes: adapters that train together; `rows`, `state` and `gradients` count all of them.
    """

    model_flops: float
    flops: float
    state: float
    gradients: float
    frozen: float
    kernels: float
    copied: float
    reduced: float
    ends: float
    n_layers: int
    rows: int
    seq_len: int
    micro: int
    residual: float
    kept: float
    kept_is_split: bool
    transient: float
    kv: float
    loss: float
    weight_reads: float
    gathers: float
    reduces: float
    traffic: float
    limits: Mapping[str, Mapping[str, int]]
    lanes: int = 1


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Estimate for one device: bytes of memory by content, and seconds of a step by bound."""

    memory: Mapping[str, float]
    seconds: Mapping[str, float]

    @property
    def n_bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def step_seconds(self) -> float:
        return max(self.seconds.values())


def estimate(demand: Demand, sizes: Sizes, chip: Chip, n_slices: int = 1) -> Estimate:
    """Computes bytes and seconds of each device of a mesh of `sizes` (an axis that is not named has
    size 1).

    With several slices, gradients are first added up within each. Then each device sends its share
    of the sums over the network.
    """
    d = demand
    lane, data, fsdp, sequence, tensor = (sizes.get(axis, 1) for axis in AXES)
    shards, n = fsdp * tensor, lane * data * fsdp * sequence * tensor
    # of a microbatch on one device
    tokens = d.rows * d.seq_len / (d.micro * lane * data * fsdp * sequence)
    state, gradients, reduced = d.state / lane, d.gradients / lane, d.reduced / lane
    memory = {
        "parameters and optimizer": (state + d.frozen) / shards,
        "gradients": gradients / shards,
        "copies of weights": d.copied / shards
        + (2 * d.kernels / d.n_layers / tensor if fsdp > 1 else 0)
        + d.ends / tensor,
        "kept activations": tokens * d.kept * d.n_layers / (tensor if d.kept_is_split else 1),
        "one layer and the loss": tokens * d.transient / tensor + d.loss / tensor,
    }

    def rest(size: float) -> float:  # the share of the bytes that a ring sends on
        return (size - 1) / size

    sent = d.micro * d.gathers * d.kernels / tensor * rest(fsdp)
    # devices of a slice that hold the same part of the gradients
    within = data * sequence / n_slices
    sent += d.micro * reduced / tensor * rest(fsdp) + 2 * reduced / shards * rest(within)
    sent += d.micro * d.reduces * 2 * tokens * d.residual * d.n_layers * rest(tensor)
    sent += (
        d.micro
        * 3
        * tokens
        * sequence
        * d.kv
        / min(tensor, max(d.limits["tensor"].values()))
        * d.n_layers
        * rest(sequence)
    )
    read = d.micro * d.weight_reads * d.kernels / tensor * (1 + (fsdp > 1)) + 2 * state / shards
    read += d.micro * tokens * d.traffic * d.n_layers / tensor
    seconds = {
        "compute": d.flops / n / chip.flops,
        "memory": read / chip.memory_bandwidth,
        "links": sent / chip.link_bandwidth,
    }
    if n_slices > 1:
        seconds["network"] = (
            2 * reduced / (shards * within) * rest(n_slices) / chip.network_bandwidth
        )
    return Estimate(memory, seconds)


def meshes(demand: Demand, n_devices: int, n_slices: int = 1) -> Iterator[dict[str, int]]:
    """Yields every mesh of `n_devices` that all sizes divide by: rows by data and fsdp, tokens by
    sequence, heads by tensor.

    Only `data` crosses slices."""
    divisors = [n for n in range(1, n_devices + 1) if n_devices % n == 0]
    lanes = [n for n in divisors if demand.lanes % n == 0]
    for sizes in itertools.product(lanes, *[divisors] * (len(AXES) - 1)):
        mesh = dict(zip(AXES, sizes, strict=True))
        if (
            math.prod(sizes) == n_devices
            and mesh["data"] % n_slices == 0
            and obstacle(demand, mesh) is None
        ):
            yield mesh


def obstacle(demand: Demand, sizes: Sizes) -> str | None:
    """Describes a size that does not divide on this mesh; None if all do."""
    shares = sizes.get("data", 1) * sizes.get("fsdp", 1)
    rows = demand.rows // demand.lanes
    if demand.lanes % sizes.get("lane", 1):
        return f"mesh axis lane:{sizes['lane']} does not divide lanes={demand.lanes}"
    if rows % (demand.micro * shares):
        return (
            f"batch={rows} rows do not divide into {demand.micro} microbatches over data x fsdp = {shares} devices; "
            f"use a multiple of {demand.micro * shares}"
        )
    for axis, limits in demand.limits.items():
        for name, size in limits.items():
            if size % sizes.get(axis, 1):
                return f"mesh axis {axis}:{sizes[axis]} does not divide {name}={size}"
    return None


@dataclasses.dataclass(frozen=True)
class Choice:
    sizes: dict[str, int]
    estimate: Estimate
    fits: bool


def ranked(
    demand: Demand, n_devices: int, chip: Chip, usable: float = 0.9, n_slices: int = 1
) -> list[Choice]:
    """Ranks all meshes, best first: those that fit in `usable` of a device's memory by the time of
    their step, then the rest by bytes.

    Ties go to the mesh that sends least, then to the one with fewer axes. Raises `UserError` if
    nothing divides.
    """
    choices = []
    for sizes in meshes(demand, n_devices, n_slices):
        found = estimate(demand, sizes, chip, n_slices)
        choices.append(Choice(sizes, found, found.n_bytes <= usable * chip.memory))
    if not choices:
        reason = obstacle(demand, {"data": n_slices, "fsdp": n_devices // n_slices}) or ""
        raise UserError(f"no mesh of {n_devices} devices divides this step: {reason}")

    def order(choice: Choice) -> tuple[float, ...]:
        e = choice.estimate
        n_axes = sum(size > 1 for size in choice.sizes.values())
        return (
            not choice.fits,
            e.step_seconds if choice.fits else e.n_bytes,
            sum(e.seconds.values()),
            n_axes,
            choice.sizes["data"],
        )

    return sorted(choices, key=order)


def choose(
    demand: Demand, n_devices: int, chip: Chip, n_slices: int = 1
) -> tuple[dict[str, int], str]:
    """Returns the sizes of the best mesh, and the reason in a line."""
    choices = ranked(demand, n_devices, chip, n_slices=n_slices)
    best = choices[0]
    if n_devices == 1:
        return best.sizes, "one device"
    whole = (demand.state + demand.gradients + demand.frozen) / 1e9
    held = f"{best.estimate.n_bytes / 1e9:.1f} of {chip.memory / 1e9:.0f} GB a device"
    if not best.fits:
        return (
            best.sizes,
            f"none of {len(choices)} meshes fits by formula; this one comes nearest with {held}",
        )
    n_fit = sum(choice.fits for choice in choices)
    bound = max(best.estimate.seconds.items(), key=lambda item: item[1])[0]
    return best.sizes, (
        f"weights, gradients and optimizer state are {whole:.1f} GB; of {len(choices)} meshes that divide, {n_fit} fit, and "
        f"this one is the fastest by formula: {held}, bound by {bound}"
    )


def show(sizes: Sizes, n_slices: int = 1) -> str:
    """Writes `{"data": 1, "fsdp": 8}` as `"fsdp:8"`. With several slices `data` becomes slices x
    devices of each."""
    parts = {axis: str(sizes[axis]) for axis in AXES if sizes.get(axis, 1) > 1}
    if n_slices > 1:
        parts["data"] = f"{n_slices}x{sizes['data'] // n_slices}"
    return ",".join(f"{axis}:{parts[axis]}" for axis in AXES if axis in parts) or "data:1"


def by_bytes(parts: Mapping[str, float] | Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{n_bytes / 1e9:.2f} GB {name}" for name, n_bytes in dict(parts).items())
