"""The mesh engine: vectors spread over all devices, each of which finds its best, merged
exactly."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kafjax.core.errors import UserError
from kafjax.core.progress import say
from kafjax.retrieval.base import VECTORS, Index, read_npy
from kafjax.retrieval.folder import Manifest

QUERIES = 64
RECALL = 0.95
DTYPES = {"float32": np.float32, "bfloat16": jnp.bfloat16, "int8": np.int8}
MESH_ENGINES = {f"mesh-{name}": name for name in DTYPES}
_SCALES = "scales.npy"
_AXIS = "shard"


class MeshIndex(Index):
    """Vectors `[C, D]` split by rows over the devices, as float32, bfloat16, or int8 with a float32
    scale a row.

    Each device scores its rows and keeps the best by `lax.approx_max_k`, whose bins are sized for
    the whole index; the best of all devices are merged exactly. On a TPU the expected recall of
    that choice is 0.95 or more; on a CPU or GPU XLA computes it exactly. Scores are those of the
    stored numbers. What is saved is what is stored: int8 does not become float32 again.

        >>> index = MeshIndex("int8")
        >>> index.build(["north", "east"], np.array([[0.0, 1.0], [1.0, 0.0]]))
        >>> ids, scores_QxK = index.search([[0.6, 0.8]], k=2)
        >>> print(ids, scores_QxK.round(1))
        [['north', 'east']] [[0.8 0.6]]
    """

    def __init__(self, dtype: str = "float32"):
        """Raises `UserError` for an unknown dtype."""
        if dtype not in DTYPES:
            raise UserError(f"vectors are stored as {', '.join(DTYPES)}, not '{dtype}'")
        super().__init__()
        self.dtype, self.engine = dtype, f"mesh-{dtype}"
        self._mesh = mesh_of(jax.devices())
        self._vectors_CxD, self._scales_C = jnp.zeros((0, 0)), jnp.zeros(0)

    @property
    def how(self) -> str:
        """States how neighbours are chosen, in words."""
        exact = jax.default_backend() != "tpu"
        found = "every vector is scored" if exact else f"approximate, recall {RECALL}"
        return f"{self.dtype} over {self._mesh.size} devices; {found}"

    def _build(self, ids: list[str], vectors_NxD: np.ndarray) -> None:
        self._place(*quantised(vectors_NxD, self.dtype))

    def _append(self, ids: list[str], vectors_MxD: np.ndarray, first: int) -> None:
        if first == 0:
            return self._build(ids, vectors_MxD)
        old_NxD, old_N = self._stored(slice(0, first))
        new_MxD, new_M = quantised(vectors_MxD, self.dtype)
        if capacity(first + len(ids), self._mesh.size) != len(self._vectors_CxD):
            return self._place(np.concatenate([old_NxD, new_MxD]), np.concatenate([old_N, new_M]))
        self._vectors_CxD, self._scales_C = _set_rows(
            self._vectors_CxD, self._scales_C, new_MxD, new_M, first
        )

    def _delete(self, ids: list[str], kept: np.ndarray) -> None:
        self._place(*self._stored(kept))

    def _search(self, queries_QxD: np.ndarray, k: int) -> tuple[list[list[str]], np.ndarray]:
        ids, scores = [], []
        for start in range(0, len(queries_QxD), QUERIES):
            batch = queries_QxD[start : start + QUERIES]
            padded = np.zeros((1 << (len(batch) - 1).bit_length(), batch.shape[1]), np.float32)
            padded[: len(batch)] = batch
            found = top_k(self._mesh, self._vectors_CxD, self._scales_C, padded, len(self), k)
            scores_QxK, rows_QxK = jax.device_get(found)
            scores.append(scores_QxK[: len(batch)])
            ids.extend([self._rows.ids[row] for row in rows_K] for rows_K in rows_QxK[: len(batch)])
        return ids, np.concatenate(scores)

    def _last(self, ids: list[str]) -> np.ndarray:
        vectors_MxD, scales_M = self._stored(slice(len(self) - len(ids), len(self)))
        return vectors_MxD.astype(np.float32) * scales_M[:, None]

    def _save(self, path: Path) -> tuple[list[str], dict[str, Any]]:
        vectors_NxD, scales_N = self._stored(slice(0, len(self)))
        # NumPy's file format has no bfloat16.
        np.save(
            path / VECTORS,
            vectors_NxD.view(np.uint16) if self.dtype == "bfloat16" else vectors_NxD,
            allow_pickle=False,
        )
        np.save(path / _SCALES, scales_N, allow_pickle=False)
        return self._rows.ids, {}

    def _load(
        self, path: Path, count: int, live: np.ndarray, manifest: Manifest, wait: Callable[[], None]
    ) -> None:
        on_disk = np.uint16 if self.dtype == "bfloat16" else DTYPES[self.dtype]
        say("search", planned(len(live), manifest.dimension or 0, self.dtype, self._mesh.size))
        check_memory(
            len(live),
            manifest.dimension or 0,
            self.dtype,
            self._mesh.devices.flat[0],
            self._mesh.size,
        )
        vectors_NxD = read_npy(path / VECTORS, (count, self.dimension), on_disk)
        scales_N = read_npy(path / _SCALES, (count,))
        if len(live) < count:
            vectors_NxD, scales_N = vectors_NxD[live], scales_N[live]
        self._place(
            vectors_NxD.view(jnp.bfloat16) if self.dtype == "bfloat16" else vectors_NxD, scales_N
        )

    def _stored(self, rows: Any) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(self._vectors_CxD)[rows], np.asarray(self._scales_C)[rows]

    def _place(self, vectors_NxD: np.ndarray, scales_N: np.ndarray) -> None:
        n, d = vectors_NxD.shape
        check_memory(n, d, self.dtype, self._mesh.devices.flat[0], self._mesh.size)
        C = capacity(n, self._mesh.size)
        self._vectors_CxD = _split(self._mesh, vectors_NxD, (C, d))
        self._scales_C = _split(self._mesh, scales_N, (C,))


def mesh_of(devices: Sequence[Any]) -> jax.sharding.Mesh:
    """Returns the mesh of one axis that vectors are split over."""
    return jax.make_mesh(
        (len(devices),), (_AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=devices
    )


def _split(mesh: jax.sharding.Mesh, array: np.ndarray, padded_shape: tuple[int, ...]) -> jax.Array:
    """Splits rows over the devices, zeros behind the last one. Each device gets its own rows of
    the array, which may be a mapped file: the whole is never in memory."""

    def part(index: Any) -> np.ndarray:
        first, end, _ = index[0].indices(padded_shape[0])
        rows = array[first:end]
        missing = [(0, end - first - len(rows)), *[(0, 0)] * (array.ndim - 1)]
        return np.pad(rows, missing) if missing[0][1] else rows

    sharding = NamedSharding(mesh, PartitionSpec(_AXIS))
    return jax.make_array_from_callback(padded_shape, sharding, part)


def quantised(vectors_NxD: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Vectors as they are stored, and the float32 scale of each row: the largest number of a row is
    127 as int8."""
    if dtype != "int8":
        return vectors_NxD.astype(DTYPES[dtype]), np.ones(len(vectors_NxD), np.float32)
    scales_N = (np.abs(vectors_NxD).max(axis=1) / 127).astype(np.float32)
    return np.rint(vectors_NxD / np.where(scales_N > 0, scales_N, 1)[:, None]).astype(
        np.int8
    ), scales_N


def capacity(n: int, n_devices: int) -> int:
    """Rows to reserve for `n` vectors: the same number on every device, few different values, at
    most 1/32 empty if large."""
    step = n_devices * max(256, (1 << max(n // n_devices, 1).bit_length()) // 64)
    return max(1, math.ceil(n / step)) * step


def planned_bytes(n: int, dimension: int, dtype: str, n_devices: int) -> int:
    """Bytes of the vectors on each device: 1.0 GB for 21 million of 768 numbers in int8 on 16
    devices."""
    return capacity(n, n_devices) // n_devices * (dimension * np.dtype(DTYPES[dtype]).itemsize + 4)


def planned(n: int, dimension: int, dtype: str, n_devices: int) -> str:
    """The memory that vectors will take, in words.

    >>> planned(21_000_000, 768, "int8", 16)
    '21000000 vectors of 768 numbers in int8 need 1.0 GB a device on 16'
    """
    need = planned_bytes(n, dimension, dtype, n_devices)
    return f"{n} vectors of {dimension} numbers in {dtype} need {need / 1e9:.1f} GB a device on {n_devices}"


def check_memory(n: int, dimension: int, dtype: str, device: jax.Device, n_devices: int) -> None:
    """Raises `UserError` where the vectors are more than a device's memory, as far as it tells."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    need = planned_bytes(n, dimension, dtype, n_devices)
    if limit is not None and need > limit:
        told = planned(n, dimension, dtype, n_devices)
        raise UserError(
            f"{told}, which have {limit / 1e9:.1f} GB; take more devices, or --engine=mesh-int8"
        )


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _set_rows(
    vectors_CxD: jax.Array,
    scales_C: jax.Array,
    new_MxD: jax.Array,
    new_M: jax.Array,
    first: jax.Array,
):
    rows = first + jnp.arange(len(new_MxD))
    return vectors_CxD.at[rows].set(new_MxD, unique_indices=True), scales_C.at[rows].set(
        new_M, unique_indices=True
    )


@functools.partial(jax.jit, static_argnums=(0, 5))
def top_k(
    mesh: jax.sharding.Mesh,
    vectors_CxD: jax.Array,
    scales_C: jax.Array,
    queries_QxD: jax.Array,
    n: jax.Array,
    k: int,
) -> tuple[jax.Array, jax.Array]:
    """Scores float32 and rows int32 `[Q, k]` of the best among the first `n` rows. Source: Chern et
    al. 2022, "TPU-KNN"."""
    C, R = len(vectors_CxD), len(vectors_CxD) // mesh.size
    # Each int8 is a bfloat16 too.
    compute = jnp.float32 if vectors_CxD.dtype == jnp.float32 else jnp.bfloat16

    def best_of_shard(
        vectors_RxD: jax.Array, scales_R: jax.Array, queries_QxD: jax.Array, n: jax.Array
    ):
        rows_R = jax.lax.axis_index(_AXIS) * R + jnp.arange(R, dtype=jnp.int32)
        q, v = queries_QxD.astype(compute), vectors_RxD.astype(compute)
        dots_QxR = jnp.einsum(
            "qd,rd->qr",
            q,
            v,
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        scores_QxR = jnp.where(rows_R < n, dots_QxR * scales_R, -jnp.inf)
        scores, places = jax.lax.approx_max_k(
            scores_QxR, min(k, R), recall_target=RECALL, reduction_input_size_override=C
        )
        # Integers, and both in one: what travels is one gather of k pairs a device.
        found_2xQxK = jnp.stack(
            [jax.lax.bitcast_convert_type(scores, jnp.int32), rows_R[places].astype(jnp.int32)]
        )
        scores, rows = jax.lax.all_gather(found_2xQxK, _AXIS, axis=2, tiled=True)
        scores, places = jax.lax.top_k(jax.lax.bitcast_convert_type(scores, jnp.float32), k)
        return scores, jnp.take_along_axis(rows, places, axis=1)

    split, whole = PartitionSpec(_AXIS), PartitionSpec()
    # Every device merges the same, which the type of a gather does not tell.
    search = jax.shard_map(
        best_of_shard,
        mesh=mesh,
        in_specs=(split, split, whole, whole),
        out_specs=(whole, whole),
        check_vma=False,
    )
    return search(vectors_CxD, scales_C, queries_QxD, jnp.asarray(n))
