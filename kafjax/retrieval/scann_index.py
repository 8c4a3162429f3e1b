"""The ScaNN engine (Guo et al. 2020, "Accelerating Large-Scale Inference with Anisotropic Vector Quantization")."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from kafjax.core.errors import UserError
from kafjax.retrieval.base import Index
from kafjax.retrieval.exact import read_npy
from kafjax.retrieval.folder import Manifest

TREE_FROM = 10_000  # below, an exhaustive scan takes well under a millisecond a query, needs no training and is exact
SCANNED = 50_000
REORDERED = 100
# ScaNN's names
_VECTORS = "dataset.npy"
_ASSETS = "scann_assets.pbtxt"
_PICKLE = "scann_docids.pkl"


class ScannIndex(Index):
    """ScaNN: exhaustive scoring when built with fewer than `tree_from` vectors, else a tree of quantised vectors.

    The tree has about sqrt(N) leaves. A query looks into half of them, or as many as hold 50,000 vectors if that is less, but at
    least a tenth of them and those that hold 40 k. It scores these by asymmetric hashing, and the best (100, or 4 k) again in
    float32: scores are exact, the choice of neighbours is approximate, and building the same vectors again may choose differently.
    Appended vectors join the structure that `build` chose: build again once an index has grown by a large factor.
    """

    engine = "scann"

    def __init__(self, tree_from: int = TREE_FROM) -> None:
        reason = why_unavailable()
        if reason is not None:
            raise UserError(reason)
        super().__init__()
        self.tree_from = tree_from
        self._searcher: Any = None  # None while empty: ScaNN cannot search nothing
        self._leaves = 0  # 0: exhaustive

    def _build(self, ids: list[str], vectors_NxD: np.ndarray) -> None:
        from scann import scann_ops_pybind

        n = len(ids)
        self._searcher, self._leaves = None, 0
        if n == 0:
            return
        builder = scann_ops_pybind.builder(vectors_NxD, REORDERED, "dot_product")
        if n < self.tree_from:
            builder = builder.score_brute_force()
        else:
            self._leaves = round(math.sqrt(n))
            builder = builder.tree(self._leaves, self._leaves_to_search(n, 1))
            builder = builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(REORDERED)
        self._searcher = builder.build(docids=list(ids))

    def _append(self, ids: list[str], vectors_MxD: np.ndarray) -> None:
        if self._searcher is None:
            return self._build(ids, vectors_MxD)
        self._searcher.upsert(ids, vectors_MxD, batch_size=len(ids))

    def _delete(self, ids: list[str], kept: np.ndarray) -> None:
        if len(kept) == 0:
            self._searcher, self._leaves = None, 0
        else:
            self._searcher.delete(ids)

    def _search(self, queries_QxD: np.ndarray, k: int) -> tuple[list[list[str]], np.ndarray]:
        if not self._leaves:
            return self._searcher.search_batched_parallel(queries_QxD, k, batch_size=64)
        n = len(self)
        reordered = min(n, max(REORDERED, 4 * k))
        leaves = self._leaves_to_search(n, k)
        ids, scores_QxK = self._searcher.search_batched_parallel(queries_QxD, k, reordered, leaves, batch_size=64)
        # Where those leaves hold fewer than k vectors, ScaNN fills up with NaN: look into all of them.
        short = np.flatnonzero(np.isnan(scores_QxK).any(axis=1))
        if len(short):
            more_ids, more_scores = self._searcher.search_batched_parallel(queries_QxD[short], k, n, self._leaves, batch_size=64)
            scores_QxK[short] = more_scores
            for row, found in zip(short, more_ids, strict=True):
                ids[row] = found
        return ids, scores_QxK

    def _leaves_to_search(self, n: int, k: int) -> int:
        share = max(min(0.5, SCANNED / n), 0.1, 40 * k / n)
        return math.ceil(self._leaves * min(1.0, share))

    def _save(self, path: Path) -> dict[str, Any]:
        if self._searcher is None:
            np.save(path / _VECTORS, np.zeros((0, self.dimension), np.float32), allow_pickle=False)
            return {"leaves": 0}
        try:
            # The inner searcher's method: the outer one adds the ids as a pickle.
            self._searcher.searcher.serialize(str(path), True)
        except RuntimeError as error:
            raise UserError(f"ScaNN cannot write {path} ({error})") from error
        return {"leaves": self._leaves}

    def _row_ids(self) -> list[str]:
        return [] if self._searcher is None else self._searcher.docids  # a delete moved the last row into the gap

    def _load(self, path: Path, ids: list[str], manifest: Manifest) -> None:
        from scann import scann_ops_pybind

        vectors_NxD = read_vectors(path, manifest)
        if len(ids) == 0:
            return self.build(ids, vectors_NxD)
        again = "build and save the index again"
        leaves = manifest.leaves
        if not isinstance(leaves, int) or _ASSETS not in manifest.files or (path / _PICKLE).exists():
            raise UserError(f"{path} is not what this engine saves; {again}")
        try:
            loaded = scann_ops_pybind.load_searcher(str(path), assets_backcompat_shim=False)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"ScaNN cannot read {path} ({error}); {again}") from error
        if loaded.size() != len(ids):
            raise UserError(f"{path} holds {loaded.size()} vectors for {len(ids)} ids; {again}")
        self._searcher = scann_ops_pybind.ScannSearcher(loaded.searcher, list(ids))
        self._leaves = leaves
        self._set(ids, vectors_NxD.shape[1])


def read_vectors(path: Path, manifest: Manifest) -> np.ndarray:
    """The vectors of a saved `ScannIndex`, float32 `[N, D]`, in the order of its ids. Needs no ScaNN."""
    return read_npy(path / _VECTORS, manifest)


def why_unavailable() -> str | None:
    """One line that says why ScaNN cannot be used here and what to do, or None where it can."""
    try:
        import scann  # noqa: F401
    except ModuleNotFoundError:
        return "ScaNN is not installed; pip install 'kafjax[retrieval]' (Linux wheels only)"
    except ImportError as error:
        return f"ScaNN cannot be imported ({error}); pip install --force-reinstall 'kafjax[retrieval]'"
    return None
