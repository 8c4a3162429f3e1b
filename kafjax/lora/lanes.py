"""Adapters of different ranks and targets in arrays of one shape, so that one program can train or
serve any mix of them.

    rank 2, q_proj only         {"q_proj/kernel": {"a": [D, 2], "b": [2, H]}}
    rank 5, q_proj and k_proj   {"q_proj/kernel": {"a": [D, 5], "b": [5, H]}, "k_proj/kernel": {"a": [D, 5], "b": [5, K]}}

    shapes, padded to rank 8    {"q_proj/kernel": {"a": [D, 8], "b": [8, H]}, "k_proj/kernel": {"a": [D, 8], "b": [8, K]}}

Padding is zero: columns of `a`, rows of `b`, whole kernels that an adapter does not target (rank
0). The gradients of padding are made of the products `x a` and `b y`, which vanish there, so
padding stays zero through any number of steps and the rank stays exact. An adapter is drawn at its
own rank and padded afterwards, so it starts as it would alone.

    >>> base = {"q_proj": {"kernel": np.zeros((4, 3), np.float32)}}
    >>> specs = [Spec(rank=1), Spec(rank=2, alpha=4)]
    >>> shapes_of_all = padded_shapes(specs, base)
    >>> shapes_of_all["q_proj/kernel"]["a"].shape
    (4, 8)
    >>> adapters = {"q_proj/kernel": {"a": np.ones((4, 2), np.float32), "b": np.ones((2, 3), np.float32)}}
    >>> slots = empty_slots(base, shapes_of_all, n_slots=2)
    >>> slots = put(slots, 1, pad(adapters, shapes_of_all), scales(specs[1], base, shapes_of_all))
    >>> n_slots(slots), slots["q_proj"]["kernel"].b[1, :3, 0].tolist()  # scaled by alpha / rank, then padding
    (2, [2.0, 2.0, 0.0])
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.lora.spec import Spec, refuse_extras
from kafjax.lora.spec import scales as scales_of
from kafjax.lora.transform import scaled, shapes
from kafjax.ops.linear import AdapterSlots, LoRAWeight

PaddedShapes = dict[str, dict[str, jax.ShapeDtypeStruct]]
"""Shapes of one padded adapter: `{kernel path: {"a": [.., in, R], "b": [.., R, out]}}`."""

_SMALLEST_BUCKET = 8


def bucket(rank: int) -> int:
    """Returns the rank that adapters of `rank` are padded to: the next power of two, at least 8."""
    return max(_SMALLEST_BUCKET, 1 << (rank - 1).bit_length())


def padded_shapes(
    specs: Sequence[Spec], params: Mapping[str, Any], rank: int | None = None
) -> PaddedShapes:
    """Returns shapes that hold each adapter of `specs`: the union of their targets, at the bucket
    of the highest rank (or at `rank`).

    Args:
      params: the base; only shapes are read.

    Raises:
      UserError: no specs, or one that does not fit the base or is of a higher rank than `rank`.
    """
    if not specs:
        raise UserError("there is no adapter to lay out: the list is empty")
    kernels, targets = trees.flatten(params), {}
    for spec in specs:
        check(spec)
        for path, pair in shapes(spec, params).items():
            if path.endswith("embedding"):
                raise UserError(
                    f"targets={spec.targets!r} adapt '{path}', which all lanes look up as one table; train that alone"
                )
            targets[path] = max(targets.get(path, 0), pair["a"].shape[-1])
    highest = max(targets.values())
    rank = bucket(highest) if rank is None else rank
    if highest > rank:
        raise UserError(
            f"LoRA rank={highest} is above {rank}, the rank that these lanes are made for"
        )

    def pair(kernel: Any) -> dict[str, jax.ShapeDtypeStruct]:
        *stacked, n_in, n_out = kernel.shape
        return {
            "a": jax.ShapeDtypeStruct((*stacked, n_in, rank), jnp.float32),
            "b": jax.ShapeDtypeStruct((*stacked, rank, n_out), jnp.float32),
        }

    return {path: pair(kernels[path]) for path in kernels if path in targets}


_NOT_SHARED = {
    "dora": "its magnitudes need the norm of each lane's sum with the base",
    "init": "it takes something of each lane's own out of the base, which is shared",
    "dropout": "lanes drop nothing",
    "trained": "parameters trained in full would be a copy a lane",
    "token_rows": "lanes look all their tokens up in one table",
}


def check(spec: Spec) -> None:
    """Raises `UserError` naming a feature that lanes and slots lack: they hold a pair of matrices
    beside the base and nothing else.

    Ranks, alphas, targets, their patterns, layers and rsLoRA may be any.
    """
    refuse_extras(
        spec,
        _NOT_SHARED,
        "an adapter with {setting} cannot share the base with others: {why}; train it alone",
    )


def pad(adapters: Mapping[str, Any], shapes: PaddedShapes) -> dict[str, dict[str, np.ndarray]]:
    """Pads an adapter with zeros to `shapes`. Raises `UserError` if it does not fit.

    Computed on the host, so that a new rank compiles nothing.
    """

    def fit(path: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
        padded = np.zeros(shape, np.float32)
        if path in adapters:
            array = np.asarray(adapters[path][name])
            padded[tuple(slice(n) for n in array.shape)] = array
        return padded

    for path, pair in adapters.items():
        rank = pair["a"].shape[-1]
        if path not in shapes:
            raise UserError(
                f"these lanes have no room for '{path}'; they are made for {', '.join(shapes)}"
            )
        if rank > shapes[path]["a"].shape[-1]:
            raise UserError(
                f"LoRA rank={rank} is above {shapes[path]['a'].shape[-1]}, the rank that these lanes are made for"
            )
    return {
        path: {name: fit(path, name, leaf.shape) for name, leaf in pair.items()}
        for path, pair in shapes.items()
    }


def unpad(padded: Mapping[str, Any], shapes: PaddedShapes) -> dict[str, dict[str, np.ndarray]]:
    """Inverse of `pad`: the parts that `shapes = lora.abstract(spec, params)` names, on the
    host."""

    def corner(array: Any, shape: tuple[int, ...]) -> np.ndarray:
        return np.asarray(array)[tuple(slice(n) for n in shape)]

    return {
        path: {name: corner(padded[path][name], leaf.shape) for name, leaf in pair.items()}
        for path, pair in shapes.items()
    }


def scales(spec: Spec, params: Mapping[str, Any], shapes: PaddedShapes) -> dict[str, np.ndarray]:
    """Scales of `b`, `{kernel path: float32 [..]}`: a number a layer where there are layers, 1
    where nothing is adapted."""
    own = scales_of(spec, params)
    return {
        path: own.get(path, np.ones(pair["b"].shape[:-2], np.float32))
        for path, pair in shapes.items()
    }


def attach(
    params: Mapping[str, Any], padded: Mapping[str, Any], scales: Mapping[str, jax.Array]
) -> trees.Tree:
    """`lora.attach` for one padded adapter, or under `vmap` for many beside one base that is not
    mapped."""
    flat = trees.flatten(params)
    for path, pair in padded.items():
        flat[path] = LoRAWeight(flat[path], pair["a"], scaled(pair["b"], scales[path]))
    return trees.unflatten(flat)


def empty_slots(params: Mapping[str, Any], shapes: PaddedShapes, n_slots: int) -> trees.Tree:
    """Returns `params` with `n_slots` empty adapters beside each kernel of `shapes`, among which
    the rows of a batch choose.

    A row that uses an empty slot is answered by the base.
    """
    flat = trees.flatten(params)
    for path, pair in shapes.items():
        room = {
            name: jnp.zeros((*leaf.shape[:-2], n_slots, *leaf.shape[-2:]), leaf.dtype)
            for name, leaf in pair.items()
        }
        flat[path] = AdapterSlots(
            flat[path], room["a"], room["b"], jnp.zeros((*pair["a"].shape[:-2], 1), jnp.int32)
        )
    return trees.unflatten(flat)


def put(
    params: trees.Tree, slot: int, padded: Mapping[str, Any], scales: Mapping[str, Any]
) -> trees.Tree:
    """Returns `params` (as `empty_slots` made them) with an adapter in a slot, in place of the
    previous one.

    The shapes are unchanged, so compiled programs still apply. The old arrays of the slots are
    overwritten where the backend can.
    """
    flat = trees.flatten(params)
    rooms = {
        path: (leaf.a, leaf.b) for path, leaf in flat.items() if isinstance(leaf, AdapterSlots)
    }
    for path, (a, b) in _put(rooms, jnp.int32(slot), padded, dict(scales)).items():
        flat[path] = AdapterSlots(flat[path].base, a, b, flat[path].rows)
    return trees.unflatten(flat)


@functools.partial(jax.jit, donate_argnums=0)
def _put(rooms, slot, padded, scales):
    def set_(room: jax.Array, value: jax.Array) -> jax.Array:
        return room.at[..., slot, :, :].set(value)

    return {
        path: (set_(a, padded[path]["a"]), set_(b, scaled(padded[path]["b"], scales[path])))
        for path, (a, b) in rooms.items()
    }


def n_slots(params: Mapping[str, Any]) -> int:
    """Counts the slots for adapters in `params`; 0 for a plain model."""
    return next(
        (
            leaf.a.shape[-3]
            for leaf in trees.flatten(params).values()
            if isinstance(leaf, AdapterSlots)
        ),
        0,
    )


def of_rows(params: trees.Tree, slot_B: Sequence[int] | np.ndarray) -> trees.Tree:
    """Returns `params` (as `empty_slots` made them) for a batch of B rows. Row i uses the adapter
    in slot `slot_B[i]`.

    Raises `UserError` for a slot that is not there.
    """
    flat, n = trees.flatten(params), n_slots(params)
    if wrong := [slot for slot in slot_B if not 0 <= slot < n]:
        raise UserError(
            f"there is no adapter slot {wrong[0]}: these parameters have {n}"
            + (f", 0 to {n - 1}" if n else "")
        )
    for path, leaf in flat.items():
        if isinstance(leaf, AdapterSlots):
            rows = jnp.broadcast_to(
                jnp.asarray(slot_B, jnp.int32), (*leaf.rows.shape[:-1], len(slot_B))
            )
            flat[path] = AdapterSlots(leaf.base, leaf.a, leaf.b, rows)
    return trees.unflatten(flat)
