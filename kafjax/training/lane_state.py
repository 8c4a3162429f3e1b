"""States of lanes: taken out of a slot, padded and unpadded, moved into a program of fewer
slots."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from kafjax import lora
from kafjax.models import Decoder
from kafjax.training.lane_step import LaneTask
from kafjax.training.step import TrainState, shardings_of


def smaller(n_left: int, n_lanes: int, lane_shards: int) -> int:
    """Number of slots to continue with when `n_left` lanes of `n_lanes` slots are left: a power of
    two per device, at most half."""
    a_device = max(1, -(-n_left // lane_shards))
    size = lane_shards * (1 << (a_device - 1).bit_length())
    return size if 2 * size <= n_lanes else n_lanes


def repack(state: TrainState, kept: Sequence[int], task: LaneTask) -> TrainState:
    """Moves the lanes in slots `kept`, in that order, into a state of `task`, which may have fewer
    slots. Values are unchanged.

    Slots of `task` beyond them repeat the last one.
    """
    slots_M = np.array([*kept, *[kept[-1]] * (task.n_lanes - len(kept))], np.int32)

    def gather(state: Any, slots_M: Any) -> Any:
        return jax.tree.map(lambda x: x[slots_M], state)

    return jax.jit(gather, out_shardings=shardings_of(task.abstract))(state, slots_M)


def _adapter_trees(function: Callable[[Any], Any], state: TrainState) -> TrainState:
    """Applies `function` to the adapter and to what an optimizer keeps in its shape (optax puts
    such trees into tuples)."""
    return jax.tree.map(
        lambda x: function(x) if isinstance(x, dict) else x,
        state,
        is_leaf=lambda x: isinstance(x, dict),
    )


def padded(state: TrainState, shapes: lora.lanes.PaddedShapes) -> TrainState:
    """Pads a lane's own state to `shapes`."""
    return _adapter_trees(lambda tree: lora.lanes.pad(tree, shapes), state)


def unpadded(state: TrainState, shapes: lora.lanes.PaddedShapes) -> TrainState:
    """Cuts a padded state to the shapes that the lane has alone."""
    return _adapter_trees(lambda tree: lora.lanes.unpad(tree, shapes), state)


@functools.partial(jax.jit, static_argnums=(0, 1))
def drawn(spec: lora.Spec, model: Decoder, key: jax.Array) -> lora.Adapters:
    """Draws a lane's adapters at its own rank."""
    return lora.init(spec, model.abstract_params(), key)


@jax.jit
def take(state: TrainState, slot: jax.Array) -> TrainState:
    """Returns the state in a slot."""
    return jax.tree.map(lambda x: x[slot], state)
