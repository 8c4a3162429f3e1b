"""Nearest neighbours by dot product, under string ids: what every engine promises.

The score of a passage is the dot product of its vector with the query's: for L2-normalised vectors,
which `Embedder` gives, the cosine similarity. Engines are exact (`ExactIndex`, anywhere JAX runs),
ScaNN (`ScannIndex`, fast on large indexes), or spread over many devices (`MeshIndex`).
"""

from __future__ import annotations

import abc
import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from absl import logging

from kafjax.core.errors import UserError
from kafjax.retrieval import folder, segments
from kafjax.retrieval.folder import Manifest
from kafjax.retrieval.segments import Rows, checked_ids

# Past this norm squared distances inside ScaNN overflow float32 and abort the process; embeddings
# are near 1.
MAX_NORM = 1e6
VECTORS = "vectors.npy"


@dataclasses.dataclass(frozen=True)
class Stats:
    """Contents of an index or a store. `search` says in words how neighbours are chosen.

    `n_segments` and `n_unsaved` (rows added or deleted) are relative to the folder that it was last
    saved to or read from; 0 segments: none. `n_bytes` lie in that folder.
    """

    engine: str
    count: int
    dimension: int | None
    search: str
    n_segments: int
    n_unsaved: int
    n_bytes: int

    @classmethod
    def of(cls, rows: Rows, engine: str, dimension: int | None, search: str) -> Self:
        log = rows.log
        n_bytes = (
            sum(file.bytes for segment in log.segments for file in segment.files.values())
            if log
            else 0
        )
        return cls(
            engine,
            len(rows),
            dimension,
            search,
            len(log.segments) if log else 0,
            rows.n_new + len(rows.gone),
            n_bytes,
        )


class Index(abc.ABC):
    """Vectors under unique string ids, which can grow and shrink without a rebuild.

    Every input is checked here, before an engine sees it, and a call that raises `UserError` has
    changed nothing. Vectors may be any real array; they are taken as float32. An engine fills in
    the underscored methods.

        >>> from kafjax.retrieval import ExactIndex
        >>> index: Index = ExactIndex()
        >>> index.build(["a", "b", "c"], np.eye(3))
        >>> index.append(["d"], [[0.6, 0.8, 0.0]])
        >>> index.delete(["a"])
        >>> ids, scores_QxK = index.search([[0.0, 1.0, 0.0]], k=2)
        >>> print(ids, scores_QxK)
        [['b', 'd']] [[1.  0.8]]
    """

    engine: str

    def __init__(self) -> None:
        self.dimension: int | None = None  # unknown until the first vectors
        self._rows = Rows()
        self._told_of_clamping = False

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def ids(self) -> tuple[str, ...]:
        """All ids."""
        return tuple(self._rows.ids)

    @property
    @abc.abstractmethod
    def how(self) -> str:
        """States how neighbours are chosen, in words."""

    @property
    def stats(self) -> Stats:
        """Size, engine and state on disk."""
        return Stats.of(self._rows, self.engine, self.dimension, self.how)

    def build(self, ids: Sequence[str], vectors_NxD: np.ndarray) -> None:
        """Replaces the contents. `N` may be 0.

        Raises `UserError` for ids that are not unique strings, one per vector, and for vectors that
        are not a finite 2-D array.
        """
        ids = checked_ids(ids)
        vectors_NxD = _checked_vectors(vectors_NxD, ids)
        self._build(ids, vectors_NxD)
        self.dimension, self._rows = vectors_NxD.shape[1], Rows(ids)

    def append(self, ids: Sequence[str], vectors_MxD: np.ndarray) -> None:
        """Adds vectors without a rebuild. Raises `UserError` as `build` does, and for an id that
        the index already has."""
        ids = checked_ids(ids)
        vectors_MxD = _checked_vectors(vectors_MxD, ids, self.dimension)
        for id in ids:
            if id in self._rows.number:
                raise UserError(f"id '{id}' is already in the index; delete it first to replace it")
        if not ids:
            return
        self._append(ids, vectors_MxD, len(self))
        self.dimension = vectors_MxD.shape[1]
        self._rows.append(ids)

    def upsert(self, ids: Sequence[str], vectors_MxD: np.ndarray) -> None:
        """Adds vectors, in place of those that the index has under the same ids. Raises `UserError`
        as `build` does."""
        ids = checked_ids(ids)
        vectors_MxD = _checked_vectors(vectors_MxD, ids, self.dimension)
        self.delete([id for id in ids if id in self._rows.number])
        self.append(ids, vectors_MxD)

    def delete(self, ids: Sequence[str]) -> None:
        """Removes vectors without a rebuild. Raises `UserError` naming an id that the index does
        not have."""
        ids = checked_ids(ids)
        for id in ids:
            if id not in self._rows.number:
                raise UserError(f"id '{id}' is not in the index ({len(self)} ids)")
        if ids:
            self._delete(ids, self._rows.delete(ids))

    def search(self, queries_QxD: np.ndarray, k: int) -> tuple[list[list[str]], np.ndarray]:
        """The `k` nearest ids of each query, best first, and their scores, float32 `[Q, K]`.

        K is `k`, or `len(self)` where that is less (told once, in the log). Raises `UserError` for
        queries that are not a finite 2-D array of the index's dimension, and for `k < 1`.
        """
        queries_QxD = _checked_vectors(queries_QxD, None, self.dimension)
        if k < 1:
            raise UserError(f"k={k} neighbours were asked for; k must be at least 1")
        if k > len(self) and not self._told_of_clamping:
            logging.warning(
                "k=%d is more than the %d passages in the index: all of them are returned",
                k,
                len(self),
            )
            self._told_of_clamping = True
        k = min(k, len(self))
        if k == 0 or len(queries_QxD) == 0:
            return [[] for _ in queries_QxD], np.zeros((len(queries_QxD), k), np.float32)
        return self._search(queries_QxD, k)

    def save(self, directory: Path | str) -> None:
        """Writes the index as a folder, which may be moved. It replaces one saved there before,
        whole or not at all.

        Saving again to the same folder costs what has changed: see `kafjax.retrieval.segments`.
        Raises `UserError` if the disk refuses, if the folder holds something else, or if another
        process has changed it since.
        """
        self._check_built()
        segments.save(
            directory, "index", self._rows, self.write_all, self.write_new, **self.fields()
        )

    @classmethod
    def load(cls, directory: Path | str) -> Self:
        """Reads a folder that this engine's `save` wrote. Raises `UserError` naming what is missing
        or damaged."""

        def read(path: Path) -> Self:
            manifest = folder.read_manifest(path, "index")
            index = cls()
            if manifest.engine != index.engine:
                raise UserError(
                    f"{path} holds an index of engine {manifest.engine!r}, not '{index.engine}'"
                )
            return index.read(path, manifest)

        return folder.reading(directory, read)

    def n_bytes(self) -> int:
        """Bytes of a fresh save but for the manifest. Measured, by saving into a temporary
        folder."""
        with tempfile.TemporaryDirectory() as temporary:
            segments.save(
                Path(temporary) / "all",
                "index",
                Rows(self.ids),
                self.write_all,
                self.write_new,
                **self.fields(),
            )
            return (
                folder.size_on_disk(Path(temporary))
                - (Path(temporary) / "all" / folder.MANIFEST).stat().st_size
            )

    def fields(self) -> dict[str, Any]:
        """Returns what a manifest says of the vectors."""
        return {"engine": self.engine, "dimension": self.dimension}

    def write_all(self, path: Path) -> tuple[list[str], dict[str, Any]]:
        """Writes all vectors into an empty folder. Returns their ids in their order there, and more
        fields of the manifest."""
        self._check_built()
        return self._save(path)

    def write_new(self, path: Path, ids: list[str]) -> None:
        """Writes the vectors of the ids appended last, float32 `[M, D]`, into an empty folder."""
        np.save(path / VECTORS, self._last(ids), allow_pickle=False)

    def read(self, directory: Path, manifest: Manifest) -> Self:
        """Reads what `save` wrote in this format or the one before. Raises `UserError` naming what
        is missing or damaged."""
        with folder.checking(directory, manifest) as wait:
            if manifest.format == 1:
                ids = segments.read_ids(directory / "ids.json")
                if len(ids) != manifest.count:
                    raise UserError(
                        f"{directory} has {len(ids)} ids for {manifest.count} vectors; {folder.AGAIN}"
                    )
                self.restore([directory], manifest, ids, [np.arange(len(ids))], wait)
                return self
            rows, live = segments.read(directory, manifest)
            self.restore(
                [directory / segment.name for segment in manifest.segments],
                manifest,
                rows.ids,
                live,
                wait,
            )
            self._rows = rows
        return self

    def restore(
        self,
        paths: list[Path],
        manifest: Manifest,
        ids: list[str],
        live: list[np.ndarray],
        wait: Callable[[], None],
    ) -> None:
        """Takes the rows `live` of the segments at `paths`, in all those of `ids`. The files are
        sound only when `wait` has returned."""
        counts = [segment.count for segment in manifest.segments] or [len(ids)]
        base, *later = zip(paths, counts, live, strict=True)
        self.dimension = manifest.dimension
        self._load(*base, manifest, wait)
        if later:
            added = [
                read_npy(path / VECTORS, (count, self.dimension))[rows]
                for path, count, rows in later
            ]
            vectors_MxD, first = np.concatenate(added), len(live[0])
            if len(vectors_MxD):
                self._append(
                    ids[first:], _checked_vectors(vectors_MxD, ids[first:], self.dimension), first
                )
        self._rows = Rows(ids)

    def _check_built(self) -> None:
        if self.dimension is None:
            raise UserError("the index was never built; there is nothing to save")

    @abc.abstractmethod
    def _build(self, ids: list[str], vectors_NxD: np.ndarray) -> None:
        """Takes checked contents, possibly none."""

    @abc.abstractmethod
    def _append(self, ids: list[str], vectors_MxD: np.ndarray, first: int) -> None:
        """Takes at least one checked new vector, after the `first` ones that are there."""

    @abc.abstractmethod
    def _delete(self, ids: list[str], kept: np.ndarray) -> None:
        """Drops known ids; `kept` are the positions of those that stay, ascending."""

    @abc.abstractmethod
    def _search(self, queries_QxD: np.ndarray, k: int) -> tuple[list[list[str]], np.ndarray]:
        """Searches for `1 <= k <= len(self)` neighbours of at least one query."""

    @abc.abstractmethod
    def _last(self, ids: list[str]) -> np.ndarray:
        """The vectors of `ids`, which were appended last, float32 `[M, D]`."""

    @abc.abstractmethod
    def _save(self, path: Path) -> tuple[list[str], dict[str, Any]]:
        """Writes the vectors into the empty folder `path`; returns their ids in that order, and
        what else the manifest should hold."""

    @abc.abstractmethod
    def _load(
        self, path: Path, count: int, live: np.ndarray, manifest: Manifest, wait: Callable[[], None]
    ) -> None:
        """Reads the rows `live` of the `count` that `_save` wrote. The dimension is set."""


def read_npy(path: Path, shape: tuple[int | None, ...], dtype: type = np.float32) -> np.ndarray:
    """The array of a saved index, mapped where it has rows. Raises `UserError` if the file holds
    anything else."""
    try:
        # NumPy cannot map an array without rows.
        array = np.load(path, mmap_mode="r" if shape[0] else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is missing or no array of vectors; {folder.AGAIN}") from error
    if array.shape != shape or array.dtype != dtype:
        raise UserError(
            f"{path} holds {array.dtype} {array.shape}, not {np.dtype(dtype).name} {shape}; {folder.AGAIN}"
        )
    return array


def _checked_vectors(
    vectors: np.ndarray, ids: list[str] | None, dimension: int | None = None
) -> np.ndarray:
    """A contiguous float32 `[N, D]`; `ids` name the vectors in messages (None: they are
    queries)."""
    what = "query" if ids is None else "vector"
    try:
        vectors = np.asarray(vectors)
    except ValueError as error:
        raise UserError(
            f"expected a 2-D array with one {what} a row, got rows of different lengths"
        ) from error
    if vectors.ndim != 2 or vectors.shape[1] == 0:
        raise UserError(f"expected a 2-D array with one {what} a row, got shape {vectors.shape}")
    usual = vectors.dtype == np.float32
    if not (usual or np.can_cast(vectors.dtype, np.float64) or vectors.dtype.name == "bfloat16"):
        raise UserError(f"expected an array of real numbers, got {vectors.dtype}")
    if ids is not None and len(ids) != len(vectors):
        raise UserError(f"{len(ids)} ids for {len(vectors)} vectors; give one id a row")
    if dimension is not None and vectors.shape[1] != dimension:
        raise UserError(
            f"the index holds vectors of dimension {dimension}, got {what} dimension {vectors.shape[1]}"
        )
    if usual:
        vectors = np.ascontiguousarray(vectors)
        # One product where all is well: a search of 0.1 ms should not wait for its checks.
        if np.vdot(vectors, vectors) <= MAX_NORM**2:
            return vectors
    with np.errstate(over="ignore"):
        vectors = np.ascontiguousarray(vectors, np.float32)
        squared_norms_N = np.einsum("nd,nd->n", vectors, vectors)
    # Not <= rather than >: a NaN compares false with everything.
    bad = np.flatnonzero(~(squared_norms_N <= MAX_NORM**2))
    if len(bad):
        name = f"query {bad[0]}" if ids is None else f"the vector of id '{ids[bad[0]]}'"
        problem = (
            "holds NaN or infinity"
            if not np.isfinite(vectors[bad[0]]).all()
            else f"is longer than {MAX_NORM:g}"
        )
        raise UserError(
            f"{name} {problem} ({len(bad)} of {len(vectors)} such); check what embedded it"
        )
    return vectors
