"""Transfer of numpy batches to the devices of all processes: each process makes the rows of its own
devices only."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding

from kafjax.training.batches import Batch, Cuts


class Source(Protocol):
    """A source of training data: `len(source)` batches of one fixed shape, each a pure function of
    its number.

    `share(step, groups)` makes only some of the `groups` of a batch, as a smaller batch, in the
    order given. `source[step]` is all.
    """

    epochs: int
    groups: int
    accumulate: int
    capacity: int
    cuts: Cuts

    def __len__(self) -> int: ...

    def __getitem__(self, step: int) -> Batch: ...

    def share(self, step: int, groups: list[int]) -> Batch: ...

    def n_tokens(self, step: int) -> int: ...

    def n_targets(self, steps: int) -> int: ...


def own_groups(source: Source, sharding: NamedSharding) -> list[int]:
    """The groups of rows that this process's devices hold under the sharding of a batch,
    ascending."""
    axis = 0 if source.accumulate == 1 else 1
    shape = (source.accumulate, source.groups)[1 - axis :]
    slices = [index[axis] for index in _parts(sharding, shape).values()]
    return sorted({group for s in slices for group in range(*s.indices(source.groups))})


def feed(source: Source, step: int, sharding: NamedSharding) -> Batch:
    """Shards batch number `step` over all devices. A mesh gets the same batch whatever processes
    its devices belong to.

    `jax.make_array_from_process_local_data` is not used: it needs the rows of a process to be
    contiguous, which not every mesh gives. Parts are copied explicitly, which the loop's guard
    against hidden transfers permits.
    """
    own = own_groups(source, sharding)
    axis = 0 if source.accumulate == 1 else 1

    def place(local: np.ndarray) -> jax.Array:
        rows = local.shape[axis] // len(own)  # of a group
        shape = list(local.shape)
        shape[axis] = rows * source.groups

        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[axis].indices(shape[axis])
            first = own.index(start // rows) * rows
            here = slice(first, first + stop - start)
            return local[(*index[:axis], here, *index[axis + 1 :])]

        parts = [
            jax.device_put(part(at), device)
            for device, at in _parts(sharding, tuple(shape)).items()
        ]
        return jax.make_array_from_single_device_arrays(tuple(shape), sharding, parts)

    return jax.tree.map(place, source.share(step, own))


def _parts(sharding: NamedSharding, shape: tuple[int, ...]) -> dict[jax.Device, tuple[slice, ...]]:
    """Maps each device of this process to its part of an array."""
    parts: Any = sharding.addressable_devices_indices_map(
        shape
    )  # typed as if a part could be missing
    return parts
