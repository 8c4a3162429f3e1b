"""The exact engine: every query against every vector, in JAX on whatever device there is. The other
engines' oracle."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kafjax.retrieval.base import VECTORS, Index, read_npy
from kafjax.retrieval.folder import Manifest

CHUNK = 16_384  # rows scored at once: bounds memory at QUERIES * CHUNK scores
QUERIES = 256
_SMALLEST = 256
_FILES = {"scann": "dataset.npy"}  # engines whose saved vectors have another name


class ExactIndex(Index):
    """Exhaustive top-k. Equal scores are ordered by insertion.

    The vectors lie in a device buffer `[C, D]` whose capacity `C` depends on their number alone:
    appending within it compiles nothing, and an index after appends and deletes equals a fresh
    build bit by bit. Those of a saved index are searched where they lie: on a CPU that is the
    mapped file, until the first change.

        >>> index = ExactIndex()
        >>> index.build(["north", "east"], [[0.0, 1.0], [1.0, 0.0]])
        >>> index.search([[0.6, 0.8]], k=2)[0]
        [['north', 'east']]
    """

    engine = "exact"

    def __init__(self) -> None:
        super().__init__()
        self._vectors_CxD = jnp.zeros((0, 0), jnp.float32)

    @property
    def how(self) -> str:
        """States how neighbours are chosen, in words."""
        return "exact: every vector is scored"

    def _build(self, ids: list[str], vectors_NxD: np.ndarray) -> None:
        padded_CxD = _padded(vectors_NxD, capacity(len(ids)))
        self._vectors_CxD = jax.device_put(padded_CxD, may_alias=False)

    def _append(self, ids: list[str], vectors_MxD: np.ndarray, first: int) -> None:
        m = len(ids)
        if first == 0:
            return self._build(ids, vectors_MxD)
        missing = capacity(first + m) - len(self._vectors_CxD)
        if missing:
            self._vectors_CxD = jnp.pad(self._vectors_CxD, ((0, missing), (0, 0)))
        self._vectors_CxD = _set_rows(self._vectors_CxD, _padded(vectors_MxD, capacity(m)), first)

    def _delete(self, ids: list[str], kept: np.ndarray) -> None:
        rows = np.zeros(capacity(len(kept)), np.int32)
        rows[: len(kept)] = kept
        self._vectors_CxD = _take_rows(self._vectors_CxD, rows)

    def _search(self, queries_QxD: np.ndarray, k: int) -> tuple[list[list[str]], np.ndarray]:
        ids: list[list[str]] = []
        scores = []
        for start in range(0, len(queries_QxD), QUERIES):
            batch = queries_QxD[start : start + QUERIES]
            # Powers of two, so that a new number of queries seldom compiles.
            padded = _padded(batch, 1 << (len(batch) - 1).bit_length())
            scores_QxK, rows_QxK = jax.device_get(_top_k(self._vectors_CxD, len(self), padded, k))
            scores.append(scores_QxK[: len(batch)])
            ids.extend([self._rows.ids[row] for row in rows_K] for rows_K in rows_QxK[: len(batch)])
        return ids, np.concatenate(scores)

    def _last(self, ids: list[str]) -> np.ndarray:
        return np.asarray(self._vectors_CxD[len(self) - len(ids) : len(self)])

    def _save(self, path: Path) -> tuple[list[str], dict[str, Any]]:
        np.save(path / VECTORS, np.asarray(self._vectors_CxD)[: len(self)], allow_pickle=False)
        return self._rows.ids, {}

    def _load(
        self, path: Path, count: int, live: np.ndarray, manifest: Manifest, wait: Callable[[], None]
    ) -> None:
        stored_NxD = read_npy(path / _FILES.get(manifest.engine, VECTORS), (count, self.dimension))
        if CHUNK <= len(live) == count:
            self._vectors_CxD = jax.device_put(stored_NxD, may_alias=True)
            return
        # A chunk at a time, in place: the vectors are in memory once.
        self._vectors_CxD = jnp.zeros((capacity(len(live)), stored_NxD.shape[1]), jnp.float32)
        step = min(len(self._vectors_CxD), CHUNK)
        for first in range(0, len(live), step):
            chunk = stored_NxD[live[first : first + step]]
            self._vectors_CxD = _set_chunk(self._vectors_CxD, _padded(chunk, step), first)


def capacity(n: int) -> int:
    """Rows to reserve for `n` vectors: few different values, all divisible into chunks, and at most
    a quarter empty if large."""
    power = max(_SMALLEST, 1 << max(n - 1, 0).bit_length())
    if power <= CHUNK:
        return power
    step = max(CHUNK, power // 8)
    return -(-n // step) * step


def _padded(rows_NxD: np.ndarray, n: int) -> np.ndarray:
    padded = np.zeros((n, rows_NxD.shape[1]), np.float32)
    padded[: len(rows_NxD)] = rows_NxD
    return padded


@functools.partial(jax.jit, donate_argnames="vectors_CxD")
def _set_rows(vectors_CxD: jax.Array, new_MxD: jax.Array, first: jax.Array) -> jax.Array:
    """Puts `new` at row `first`, in place; its rows past the capacity are padding and fall away."""
    rows = first + jnp.arange(len(new_MxD))
    return vectors_CxD.at[rows].set(
        new_MxD, mode="drop", unique_indices=True, indices_are_sorted=True
    )


@functools.partial(jax.jit, donate_argnames="vectors_CxD")
def _set_chunk(vectors_CxD: jax.Array, chunk_RxD: jax.Array, first: jax.Array) -> jax.Array:
    """Puts a chunk at row `first`, in place. Faster than `_set_rows`, but the chunk must end within
    the capacity."""
    return jax.lax.dynamic_update_slice(vectors_CxD, chunk_RxD, (first, 0))


@jax.jit
def _take_rows(vectors_CxD: jax.Array, rows: jax.Array) -> jax.Array:
    return vectors_CxD[rows]


@functools.partial(jax.jit, static_argnames="k")
def _top_k(
    vectors_CxD: jax.Array, n: jax.Array, queries_QxD: jax.Array, k: int
) -> tuple[jax.Array, jax.Array]:
    """Scores float32 and rows int32 `[Q, k]` of the best among the first `n` rows, a chunk of rows
    at a time."""
    C, Q = len(vectors_CxD), len(queries_QxD)
    R = min(C, CHUNK)

    def step(best: tuple[jax.Array, jax.Array], chunk: tuple[jax.Array, jax.Array]):
        vectors_RxD, first = chunk
        rows_R = first + jnp.arange(R, dtype=jnp.int32)
        scores_QxR = jnp.einsum(
            "qd,rd->qr", queries_QxD, vectors_RxD, precision=jax.lax.Precision.HIGHEST
        )
        # top_k would put -0.0 behind 0.0: they are a tie
        scores_QxR = jnp.where(scores_QxR == 0, 0.0, scores_QxR)
        scores_QxR = jnp.where(rows_R < n, scores_QxR, -jnp.inf)
        # top_k takes the lower position first among equals: the best so far come from earlier rows,
        # so they stand first.
        scores, positions = jax.lax.top_k(scores_QxR, min(k, R))
        scores = jnp.concatenate([best[0], scores], axis=1)
        rows = jnp.concatenate([best[1], rows_R[positions]], axis=1)
        scores, positions = jax.lax.top_k(scores, k)
        return (scores, jnp.take_along_axis(rows, positions, axis=1)), None

    def sliced(best: tuple[jax.Array, jax.Array], first: jax.Array):
        return step(best, (jax.lax.dynamic_slice_in_dim(vectors_CxD, first, R), first))

    best = jnp.full((Q, k), -jnp.inf), jnp.zeros((Q, k), jnp.int32)
    whole = C - C % R
    best, _ = jax.lax.scan(sliced, best, jnp.arange(0, whole, R, dtype=jnp.int32))
    if whole < C:
        # Vectors that lie in a file are not padded to a capacity: only their last chunk is.
        rest_RxD = jnp.pad(vectors_CxD[whole:], ((0, R - C % R), (0, 0)))
        best, _ = step(best, (rest_RxD, jnp.int32(whole)))
    return best
