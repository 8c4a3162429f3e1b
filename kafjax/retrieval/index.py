"""Opens an index by the name of its engine, or as it was saved."""

from __future__ import annotations

from pathlib import Path

from absl import logging

from kafjax.core.errors import UserError, nearest
from kafjax.retrieval import folder
from kafjax.retrieval.base import Index
from kafjax.retrieval.exact import ExactIndex
from kafjax.retrieval.folder import Manifest
from kafjax.retrieval.mesh_index import MESH_ENGINES, MeshIndex
from kafjax.retrieval.scann_index import ScannIndex, why_unavailable

ENGINES = ("auto", "scann", "exact", *MESH_ENGINES)


def open_index(engine: str = "auto", recall: float | None = None) -> Index:
    """An empty index. `auto` is ScaNN where it is installed, else the exact engine (told in the
    log). `recall` is the target of ScaNN's tree; the other engines have one recall.

        >>> open_index("exact").stats.engine
        'exact'

    Raises `UserError` for an unknown engine, and for `scann` where ScaNN cannot be imported.
    """
    if engine not in ENGINES:
        raise UserError(f"unknown index engine '{engine}'. {nearest(engine, ENGINES)}")
    if engine == "exact":
        return ExactIndex()
    if engine in MESH_ENGINES:
        return MeshIndex(MESH_ENGINES[engine])
    reason = why_unavailable()
    if reason is None:
        return ScannIndex(recall=recall)
    if engine == "scann":
        raise UserError(reason)
    logging.warning("searching with the exact engine: %s", reason)
    return ExactIndex()


def load_index(directory: Path | str) -> Index:
    """Reads a saved index of any engine. Where ScaNN is not installed its vectors are served by the
    exact engine (told in the log).

        >>> import tempfile, numpy
        >>> index = open_index("exact")
        >>> index.build(["a", "b"], numpy.eye(2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     index.save(folder)
        ...     load_index(folder).ids
        ('a', 'b')

    Raises `UserError` naming what is missing or damaged.
    """
    return folder.reading(directory, _load)


def _load(directory: Path) -> Index:
    manifest = folder.read_manifest(directory, "index")
    return index_for(directory, manifest).read(directory, manifest)


def index_for(directory: Path, manifest: Manifest) -> Index:
    """An empty index that can read what a manifest describes. Raises `UserError` for an unknown
    engine."""
    if manifest.engine == ExactIndex.engine:
        return ExactIndex()
    if manifest.engine in MESH_ENGINES:
        return MeshIndex(MESH_ENGINES[manifest.engine])
    if manifest.engine != ScannIndex.engine:
        raise UserError(
            f"{directory} is of engine {manifest.engine!r}, which is none of {', '.join(ENGINES[1:])}; {folder.AGAIN}"
        )
    reason = why_unavailable()
    if reason is None:
        return ScannIndex()
    logging.warning("searching %s with the exact engine: %s", directory, reason)
    return ExactIndex()
