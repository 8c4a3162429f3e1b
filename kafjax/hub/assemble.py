"""Named tensors -> a parameter tree on its devices, streamed: the host never holds more than a
tensor or two. Anything odd is fatal.

Each tensor, or each piece of one that holds several, is read and put where its shards belong, and
there written into its layer of the stacked parameter:

    file: [out, in] of layer 3  ->  devices: [out, in]  ->  parameter [L, in, out], at [3]

The parameter's memory is donated to that write, so it is changed in place. A device reads only its
own part of a file's tensor. A kernel that is to be stored as integers is quantised there, a layer
at a time: its floats are never all in memory.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.hub.names import Piece, Table
from kafjax.ops.quantized import QuantizedKernel, quantize


class Tensor(Protocol):
    """A numpy array, or a tensor in a file of which `[index]` reads a part."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: Any) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Rows `start` to `stop` of a tensor, read as one."""

    tensor: Tensor
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.start, *self.tensor.shape[1:])

    def __getitem__(self, index: Any) -> np.ndarray:
        rows, *rest = (slice(None),) if index is ... else index
        begin, end, _ = rows.indices(self.stop - self.start)
        return self.tensor[(slice(self.start + begin, self.start + end), *rest)]


def assemble(
    tensors: Iterable[tuple[str, Tensor]], table: Table, abstract: trees.Tree, source: str
) -> trees.Tree:
    """Fills `abstract` from `(name, tensor)` pairs by the table of the family.

    Args:
      abstract: shapes, dtypes and, where the parameters are to lie on a mesh, shardings
        (`NamedSharding`). Kernels may be abstract `QuantizedKernel`s (`quantized.abstract`).
      source: of the tensors, for messages.

    Raises:
      UserError: naming the tensor, for an extra, missing, duplicate, misshapen or non-finite one.
    """
    leaves = trees.flatten(abstract)
    expected = table.pieces(abstract)
    stacked_leaves = {
        piece.entry.path: leaves[piece.entry.path]
        for pieces in expected.values()
        for piece in pieces
        if piece.index or isinstance(leaves[piece.entry.path], QuantizedKernel)
    }
    params: dict[str, Any] = _zeros(stacked_leaves)
    seen: set[str] = set()
    # of the piece before: devices take it while the next one is read
    pending: list[tuple[str, jax.Array]] = []
    for full_name, tensor in tensors:
        name = table.canonical(full_name)
        if name not in expected:
            if table.unused.fullmatch(name) or table.idle.fullmatch(name):
                continue
            raise UserError(
                f"{source}: extra tensor '{full_name}' that this model has no place for"
            )
        if name in seen:
            raise UserError(f"{source}: tensor '{full_name}' is there twice")
        seen.add(name)
        pieces = expected[name]
        if tuple(tensor.shape) != (
            wanted := (pieces[-1].stop, *_stored_shape(pieces[0], leaves)[1:])
        ):
            raise UserError(
                f"{source}: tensor '{full_name}' has shape {list(tensor.shape)}, config.json asks for {list(wanted)}"
            )
        for piece in pieces:
            path, leaf = piece.entry.path, leaves[piece.entry.path]
            part = tensor if len(pieces) == 1 else _Rows(tensor, piece.start, piece.stop)
            # What is put has no name here: it would live on while the next one is read.
            if isinstance(leaf, QuantizedKernel):
                params[path], finite = write_quantized(
                    params.pop(path),
                    _put(part, piece, leaf.values),
                    piece.index,
                    piece.entry.transpose,
                )
            elif not piece.index:
                params[path], finite = _whole(
                    _put(part, piece, leaf), leaf.dtype, piece.entry.transpose
                )
            else:
                params[path], finite = write_layer(
                    params.pop(path), _put(part, piece, leaf), piece.index, piece.entry.transpose
                )
            _check(source, pending)
            pending = [(full_name, finite)]
    _check(source, pending)
    if missing := [name for name in expected if name not in seen]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{source}: tensor '{missing[0]}'{more} missing")
    return trees.unflatten({path: params[path] for path in leaves})


def _check(source: str, pending: list[tuple[str, jax.Array]]) -> None:
    for name, finite in pending:
        if not bool(finite):
            raise UserError(f"{source}: tensor '{name}' holds NaN or infinity; the file is damaged")


def _zeros(leaves: dict[str, Any]) -> dict[str, Any]:
    """Makes the parameters that are written layer by layer, in one program for all of them: one for
    each shape takes longer to compile than a small model to load."""
    make = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype), leaves)
    return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, leaves))()


def _stored_shape(piece: Piece, leaves: dict[str, jax.ShapeDtypeStruct]) -> tuple[int, ...]:
    shape = leaves[piece.entry.path].shape[len(piece.index) :]
    return shape[::-1] if piece.entry.transpose else shape


def _put(tensor: Tensor, piece: Piece, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """The piece as it is stored, in the places of its layer of the parameter."""
    entry = piece.entry

    def read(index: Any) -> np.ndarray:
        part = tensor[index]
        return part + np.float32(entry.offset) if entry.offset else part

    if leaf.sharding is None:
        # `jnp.asarray` compiles a program for each shape of a numpy array
        return jax.device_put(read(...), may_alias=False)
    spec = tuple(leaf.sharding.spec) + (None,) * (len(leaf.shape) - len(leaf.sharding.spec))
    spec = spec[len(piece.index) :]
    sharding = NamedSharding(
        leaf.sharding.mesh, PartitionSpec(*(spec[::-1] if entry.transpose else spec))
    )
    return jax.make_array_from_callback(tuple(tensor.shape), sharding, read)


def _whole(tensor: jax.Array, dtype: Any, transpose: bool) -> tuple[jax.Array, jax.Array]:
    # of that dtype it is not copied
    return (tensor.T if transpose else tensor).astype(dtype), _finite(tensor)


@jax.jit
def _finite(tensor: jax.Array) -> jax.Array:
    return jnp.isfinite(tensor).all()


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def write_layer(
    stacked: jax.Array, tensor: jax.Array, index: tuple[int, ...], transpose: bool
) -> tuple[jax.Array, jax.Array]:
    """The parameter with the tensor at `index` (layer, and expert), in the memory of `stacked`; and
    whether all of it is finite.

    One program, because compiling is a good part of loading a small model. Not by `.at[index].set`:
    that is a scatter, and a scatter into bfloat16 has the whole parameter converted, at every
    layer, where the hardware does not compute in bfloat16.
    """
    value = (tensor.T if transpose else tensor).astype(stacked.dtype)
    return _written(stacked, value, index), jnp.isfinite(tensor).all()


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def write_quantized(
    stacked: QuantizedKernel, tensor: jax.Array, index: tuple[int, ...], transpose: bool
) -> tuple[QuantizedKernel, jax.Array]:
    """The kernel with the tensor, rounded to its format, as `kernel[index]`, and whether all of the
    tensor is finite."""
    value = quantize(tensor.T if transpose else tensor, stacked.format)
    return jax.tree.map(functools.partial(_written, index=index), stacked, value), jnp.isfinite(
        tensor
    ).all()


def _written(stacked: jax.Array, value: jax.Array, index: tuple[int, ...]) -> jax.Array:
    start = (*index, *(0 for _ in value.shape))
    return jax.lax.dynamic_update_slice(
        stacked, value.reshape((1,) * len(index) + value.shape), start
    )
