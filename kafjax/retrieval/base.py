"""Nearest neighbours by dot product, under string ids: what every engine promises.

The score of a passage is the dot product of its vector with the query's: for L2-normalised vectors, which `Embedder` gives,
the cosine similarity. Engines are exact (`ExactIndex`, anywhere JAX runs) or ScaNN (`ScannIndex`, fast on large indexes).
"""

from __future__ import annotations

import abc
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from absl import logging

from kafjax.core.errors import UserError
from kafjax.core.rundir import write_atomic
from kafjax.core.schema import read
from kafjax.retrieval import folder
from kafjax.retrieval.folder import Manifest

# Past this norm squared distances inside ScaNN overflow float32 and abort the process; embeddings are near 1.
MAX_NORM = 1e6
_IDS = "ids.json"


class Index(abc.ABC):
    """Vectors under unique string ids, which can grow and shrink without a rebuild.

    Every input is checked here, before an engine sees it, and a call that raises `UserError` has changed nothing.
    Vectors may be any real array; they are kept as float32. An engine fills in the underscored methods.
    """

    engine: ClassVar[str]

    def __init__(self) -> None:
        self.dimension: int | None = None  # unknown until the first vectors
        self._ids: list[str] = []
        self._known: set[str] = set()
        self._told_of_clamping = False

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def ids(self) -> tuple[str, ...]:
        """All ids."""
        return tuple(self._ids)

    def build(self, ids: Sequence[str], vectors_NxD: np.ndarray) -> None:
        """Replaces the contents. `N` may be 0.

        Raises `UserError` for ids that are not unique strings, one per vector, and for vectors that are not a finite 2-D array.
        """
        ids = checked_ids(ids)
        vectors_NxD = _checked_vectors(vectors_NxD, ids)
        self._build(ids, vectors_NxD)
        self._set(ids, vectors_NxD.shape[1])

    def append(self, ids: Sequence[str], vectors_MxD: np.ndarray) -> None:
        """Adds vectors without a rebuild. Raises `UserError` as `build` does, and for an id that the index already has."""
        ids = checked_ids(ids)
        vectors_MxD = _checked_vectors(vectors_MxD, ids, self.dimension)
        for id in ids:
            if id in self._known:
                raise UserError(f"id '{id}' is already in the index; delete it first to replace it")
        if not ids:
            return
        self._append(ids, vectors_MxD)
        self.dimension = vectors_MxD.shape[1]
        self._ids += ids
        self._known.update(ids)

    def delete(self, ids: Sequence[str]) -> None:
        """Removes vectors without a rebuild. Raises `UserError` naming an id that the index does not have."""
        ids = checked_ids(ids)
        for id in ids:
            if id not in self._known:
                raise UserError(f"id '{id}' is not in the index ({len(self)} ids)")
        if not ids:
            return
        gone = set(ids)
        kept = np.array([row for row, id in enumerate(self._ids) if id not in gone], np.int32)
        self._delete(ids, kept)
        self._set([self._ids[row] for row in kept], self.dimension)

    def search(self, queries_QxD: np.ndarray, k: int) -> tuple[list[list[str]], np.ndarray]:
        """The `k` nearest ids of each query, best first, and their scores, float32 `[Q, K]`.

        K is `k`, or `len(self)` where that is less (told once, in the log). Raises `UserError` for queries that are not a
        finite 2-D array of the index's dimension, and for `k < 1`.
        """
        queries_QxD = _checked_vectors(queries_QxD, None, self.dimension)
        if k < 1:
            raise UserError(f"k={k} neighbours were asked for; k must be at least 1")
        if k > len(self) and not self._told_of_clamping:
            logging.warning("k=%d is more than the %d passages in the index: all of them are returned", k, len(self))
            self._told_of_clamping = True
        k = min(k, len(self))
        if k == 0 or len(queries_QxD) == 0:
            return [[] for _ in queries_QxD], np.zeros((len(queries_QxD), k), np.float32)
        return self._search(queries_QxD, k)

    def save(self, directory: Path | str) -> None:
        """Writes the index as a folder, which may be moved. It replaces one saved there before, whole or not at all.

        Raises `UserError` if the disk refuses, or if the folder holds something else.
        """
        with folder.replacing(Path(directory)) as path:
            self.write(path)

    @classmethod
    def load(cls, directory: Path | str) -> Self:
        """Reads a folder that this engine's `save` wrote. Raises `UserError` naming what is missing or damaged."""

        def read(path: Path) -> Self:
            manifest = folder.read_manifest(path, "index")
            if manifest.engine != cls.engine:
                raise UserError(f"{path} holds an index of engine {manifest.engine!r}, not '{cls.engine}'")
            index = cls()
            index._load(path, read_ids(path, manifest), manifest)
            return index

        return folder.reading(directory, read)

    def n_bytes(self) -> int:
        """Bytes that `save` writes: what must be kept. Measured, by saving into a temporary folder."""
        with tempfile.TemporaryDirectory() as temporary:
            self.write(Path(temporary))
            return folder.size_on_disk(Path(temporary))

    def write(self, path: Path) -> None:
        """Writes the index into an empty folder, which is whole at the end. For `save`, and for what holds an index."""
        if self.dimension is None:
            raise UserError("the index was never built; there is nothing to save")
        fields = self._save(path)
        write_atomic(path / _IDS, json.dumps(self._row_ids()))
        folder.write_manifest(path, "index", engine=self.engine, dimension=self.dimension, count=len(self), **fields)

    def _set(self, ids: list[str], dimension: int | None) -> None:
        self.dimension = dimension
        self._ids = ids
        self._known = set(ids)

    def _row_ids(self) -> list[str]:
        """The ids in the order in which `_save` writes the vectors."""
        return self._ids

    @abc.abstractmethod
    def _build(self, ids: list[str], vectors_NxD: np.ndarray) -> None:
        """Takes checked contents, possibly none."""

    @abc.abstractmethod
    def _append(self, ids: list[str], vectors_MxD: np.ndarray) -> None:
        """Takes at least one checked new vector, after those in `self._ids`."""

    @abc.abstractmethod
    def _delete(self, ids: list[str], kept: np.ndarray) -> None:
        """Drops known ids; `kept` are the positions in `self._ids` (still as before) that stay, ascending."""

    @abc.abstractmethod
    def _search(self, queries_QxD: np.ndarray, k: int) -> tuple[list[list[str]], np.ndarray]:
        """Searches for `1 <= k <= len(self)` neighbours of at least one query."""

    @abc.abstractmethod
    def _save(self, path: Path) -> dict[str, Any]:
        """Writes the vectors into the empty folder `path`; returns what else the manifest should hold."""

    @abc.abstractmethod
    def _load(self, path: Path, ids: list[str], manifest: Manifest) -> None:
        """Reads what `_save` wrote and takes `ids`; the files are already checked against their checksums."""


def read_ids(directory: Path, manifest: Manifest) -> list[str]:
    """The ids of a saved index, in the order of its vectors. Raises `UserError` if they do not fit the manifest."""
    again = "build and save the index again"
    if _IDS not in manifest.files:
        raise UserError(f"{directory}/{_IDS} is missing; {again}")
    stored = read(list[str], directory / _IDS, fix=again)
    try:
        ids = checked_ids(stored)
    except UserError as error:
        raise UserError(f"{directory / _IDS}: {error}; {again}") from error
    if len(ids) != manifest.count:
        raise UserError(f"{directory} has {len(ids)} ids for {manifest.count} vectors; {again}")
    return ids


def checked_ids(ids: Sequence[str]) -> list[str]:
    """Returns the ids as a list. Raises `UserError` for one that is no string, or is given twice."""
    if isinstance(ids, str):
        raise UserError(f"ids must be a list of strings, got the one string '{ids}'")
    ids = list(ids)
    seen: set[str] = set()
    for id in ids:
        if not isinstance(id, str):
            raise UserError(f"ids must be strings, got {id!r}")
        if id in seen:
            raise UserError(f"id '{id}' is given twice; ids must be unique")
        seen.add(id)
    return ids


def _checked_vectors(vectors: np.ndarray, ids: list[str] | None, dimension: int | None = None) -> np.ndarray:
    """A contiguous float32 `[N, D]`; `ids` name the vectors in messages (None: they are queries)."""
    what = "query" if ids is None else "vector"
    try:
        vectors = np.asarray(vectors)
    except ValueError as error:
        raise UserError(f"expected a 2-D array with one {what} a row, got rows of different lengths") from error
    if vectors.ndim != 2 or vectors.shape[1] == 0:
        raise UserError(f"expected a 2-D array with one {what} a row, got shape {vectors.shape}")
    if not np.can_cast(vectors.dtype, np.float64) and vectors.dtype.name != "bfloat16":
        raise UserError(f"expected an array of real numbers, got {vectors.dtype}")
    if ids is not None and len(ids) != len(vectors):
        raise UserError(f"{len(ids)} ids for {len(vectors)} vectors; give one id a row")
    if dimension is not None and vectors.shape[1] != dimension:
        raise UserError(f"the index holds vectors of dimension {dimension}, got {what} dimension {vectors.shape[1]}")
    with np.errstate(over="ignore"):
        vectors = np.ascontiguousarray(vectors, np.float32)
        squared_norms_N = np.einsum("nd,nd->n", vectors, vectors)
    # Not <= rather than >: a NaN compares false with everything.
    bad = np.flatnonzero(~(squared_norms_N <= MAX_NORM**2))
    if len(bad):
        name = f"query {bad[0]}" if ids is None else f"the vector of id '{ids[bad[0]]}'"
        problem = "holds NaN or infinity" if not np.isfinite(vectors[bad[0]]).all() else f"is longer than {MAX_NORM:g}"
        raise UserError(f"{name} {problem} ({len(bad)} of {len(vectors)} such); check what embedded it")
    return vectors
