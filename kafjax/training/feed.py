"""From batches of numpy arrays to arrays on the devices of all processes: each process makes the rows of its own devices only."""

from __future__ import annotations

from typing import Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding

from kafjax.training.batches import Batch, Cuts


class Source(Protocol):
    """What training reads: `len(source)` batches of one fixed shape, each a pure function of its number.

    `share(step, groups)` makes only some of the `groups` of a batch, as a smaller batch, in the order given. `source[step]` is all.
    """

    epochs: int
    groups: int
    accumulate: int
    cuts: Cuts

    def __len__(self) -> int: ...

    def __getitem__(self, step: int) -> Batch: ...

    def share(self, step: int, groups: list[int]) -> Batch: ...

    def n_tokens(self, step: int) -> int: ...

    def n_targets(self, steps: int) -> int: ...


def own_groups(source: Source, sharding: NamedSharding) -> list[int]:
    """The groups of rows that this process's devices hold under the sharding of a batch, ascending."""
    axis = 0 if source.accumulate == 1 else 1
    shape = (source.accumulate, source.groups)[1 - axis :]
    slices = [index[axis] for index in sharding.addressable_devices_indices_map(shape).values()]
    return sorted({group for s in slices for group in range(*s.indices(source.groups))})


def feed(source: Source, step: int, sharding: NamedSharding) -> Batch:
    """Batch number `step`, laid over all devices. A mesh lays out the same batch whatever process its devices belong to.

    Not `jax.make_array_from_process_local_data`: that wants the rows of a process in one stretch, which a mesh need not give it.
    Each part is copied by name, which the loop's guard against hidden transfers lets pass.
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

        parts = [jax.device_put(part(at), device) for device, at in sharding.addressable_devices_indices_map(tuple(shape)).items()]
        return jax.make_array_from_single_device_arrays(tuple(shape), sharding, parts)

    return jax.tree.map(place, source.share(step, own))
