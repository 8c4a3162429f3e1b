"""The ScaNN engine (Guo et al. 2020, "Accelerating Large-Scale Inference with Anisotropic Vector
Quantization")."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kafjax.core.errors import UserError
from kafjax.retrieval.base import Index, read_npy
from kafjax.retrieval.folder import AGAIN, Manifest
from kafjax.retrieval.segments import read_ids

# below, an exhaustive scan takes well under a millisecond a query, needs no training and is exact
TREE_FROM = 10_000
SCANNED = 50_000
REORDERED = 100
# ScaNN's names
_VECTORS = "dataset.npy"
_ASSETS = "scann_assets.pbtxt"
_PICKLE = "scann_docids.pkl"


class ScannIndex(Index):
    """ScaNN: exhaustive scoring when built with fewer than `tree_from` vectors, else a tree of
    quantised vectors.

    The tree has about sqrt(N) leaves. A query looks into half of them, or as many as hold 50,000
    vectors if that is less, but at least a tenth of them and those that hold 40 k. It scores these
    by asymmetric hashing, and the best (100, or 4 k) again in float32: scores are exact, the choice
    of neighbours is approximate, and building the same vectors again may choose differently.
    Appended vectors join the structure that `build` chose: build again once an index has grown by a
    large factor.

        >>> index = ScannIndex()
        >>> index.build(["north", "east"], np.array([[0.0, 1.0], [1.0, 0.0]]))
        >>> index.search([[0.6, 0.8]], k=2)[0]
        [['north', 'east']]
    """

    engine = "scann"
    how = "ScaNN: a tree of quantised vectors, scores exact; exhaustive below 10,000 vectors"

    def __init__(self, tree_from: int = TREE_FROM) -> None:
        reason = why_unavailable()
        if reason is not None:
            raise UserError(reason)
        super().__init__()
        self.tree_from = tree_from
        self._searcher: Any = None  # None while empty: ScaNN cannot search nothing
        self._leaves = 0  # 0: exhaustive
        # since the structure was built or read: ScaNN gives no vector back
        self._added: dict[str, np.ndarray] = {}

    def _build(self, ids: list[str], vectors_NxD: np.ndarray) -> None:
        from scann import scann_ops_pybind

        n = len(ids)
        self._searcher, self._leaves = None, 0
        self._added = {}
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

    def _append(self, ids: list[str], vectors_MxD: np.ndarray, first: int) -> None:
        if first == 0:
            self._build(ids, vectors_MxD)
            self._added = dict(zip(ids, vectors_MxD.copy(), strict=True))
            return
        self._added.update(zip(ids, vectors_MxD.copy(), strict=True))
        self._searcher.upsert(ids, vectors_MxD, batch_size=len(ids))

    def _delete(self, ids: list[str], kept: np.ndarray) -> None:
        for id in ids:
            self._added.pop(id, None)
        if len(kept) == 0:
            self._searcher, self._leaves = None, 0
        else:
            self._searcher.delete(ids)

    def _search(self, queries_QxD: np.ndarray, k: int) -> tuple[list[list[str]], np.ndarray]:
        settings = self.settings(k)
        if len(queries_QxD) == 1:  # to start threads would take a tenth of such a search
            found, scores_K = self._searcher.search(queries_QxD[0], k, *settings)
            if len(found) == k:
                return [found], scores_K[None]
        ids, scores_QxK = self._searcher.search_batched_parallel(
            queries_QxD, k, *settings, batch_size=64
        )
        # Where those leaves hold fewer than k vectors, ScaNN fills up with NaN: look into all of
        # them.
        short = np.flatnonzero(np.isnan(scores_QxK).any(axis=1))
        if len(short):
            more_ids, more_scores = self._searcher.search_batched_parallel(
                queries_QxD[short], k, len(self), self._leaves, batch_size=64
            )
            scores_QxK[short] = more_scores
            for row, found in zip(short, more_ids, strict=True):
                ids[row] = found
        return ids, scores_QxK

    def settings(self, k: int) -> tuple[int, int]:
        """Vectors to score again, and leaves to look into, for `k` neighbours; ScaNN's own (-1)
        where the search is exhaustive."""
        if not self._leaves:
            return -1, -1
        n = len(self)
        return min(n, max(REORDERED, 4 * k)), self._leaves_to_search(n, k)

    def _leaves_to_search(self, n: int, k: int) -> int:
        share = max(min(0.5, SCANNED / n), 0.1, 40 * k / n)
        return math.ceil(self._leaves * min(1.0, share))

    def _last(self, ids: list[str]) -> np.ndarray:
        found = [self._added[id] for id in ids]
        return np.stack(found) if found else np.zeros((0, self.dimension or 0), np.float32)

    def _save(self, path: Path) -> tuple[list[str], dict[str, Any]]:
        if self._searcher is None:
            np.save(
                path / _VECTORS, np.zeros((0, self.dimension or 0), np.float32), allow_pickle=False
            )
            return [], {"leaves": 0}
        try:
            # The inner searcher's method: the outer one adds the ids as a pickle.
            self._searcher.searcher.serialize(str(path), True)
        except RuntimeError as error:
            raise UserError(f"ScaNN cannot write {path} ({error})") from error
        # in an order of its own: a delete moves the last row into the gap
        return list(self._searcher.docids), {"leaves": self._leaves}

    def _load(
        self, path: Path, count: int, live: np.ndarray, manifest: Manifest, wait: Callable[[], None]
    ) -> None:
        from scann import scann_ops_pybind

        if count == 0:
            return
        read_npy(path / _VECTORS, (count, self.dimension))
        files = (manifest.segments[0] if manifest.segments else manifest).files
        if manifest.leaves is None or _ASSETS not in files or (path / _PICKLE).exists():
            raise UserError(f"{path} is not what this engine saves; {AGAIN}")
        ids = read_ids(path / "ids.json")
        wait()  # ScaNN itself reads anything
        try:
            loaded = scann_ops_pybind.load_searcher(str(path), assets_backcompat_shim=False)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"ScaNN cannot read {path} ({error}); {AGAIN}") from error
        if not loaded.size() == len(ids) == count:
            raise UserError(f"{path} holds {loaded.size()} vectors for {len(ids)} ids; {AGAIN}")
        self._searcher = scann_ops_pybind.ScannSearcher(loaded.searcher, ids)
        self._leaves = manifest.leaves
        if len(live) < count:
            living = np.zeros(count, bool)
            living[live] = True
            self._delete([id for id, lives in zip(ids, living, strict=True) if not lives], live)


def why_unavailable() -> str | None:
    """One line that says why ScaNN cannot be used here and what to do, or None where it can."""
    try:
        import scann  # noqa: F401
    except ModuleNotFoundError:
        return "ScaNN is not installed; pip install 'kafjax[retrieval]' (Linux wheels only), or --engine=exact"
    except ImportError as error:
        return (
            f"ScaNN cannot be imported ({error}); pip install --force-reinstall 'kafjax[retrieval]'"
        )
    return None
