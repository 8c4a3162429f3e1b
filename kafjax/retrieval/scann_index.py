"""The ScaNN engine (Guo et al. 2020, "Accelerating Large-Scale Inference with Anisotropic Vector
Quantization")."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kafjax.core.errors import UserError
from kafjax.core.progress import say
from kafjax.retrieval.base import Index, read_npy
from kafjax.retrieval.folder import AGAIN, Manifest
from kafjax.retrieval.segments import read_ids
from kafjax.retrieval.tuning import Setting, split_rows, tune

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
    of neighbours is approximate, and building the same vectors again may choose differently. With a
    target for the recall it looks, for up to 100 neighbours, into as few leaves as reach that for
    vectors that the tree was built without and that joined it afterwards. Appended vectors join the structure and the settings
    that `build` chose: build again once an index has grown by a large factor.

        >>> index = ScannIndex()
        >>> index.build(["north", "east"], np.array([[0.0, 1.0], [1.0, 0.0]]))
        >>> index.search([[0.6, 0.8]], k=2)[0]
        [['north', 'east']]
    """

    engine = "scann"

    def __init__(self, tree_from: int = TREE_FROM, recall: float | None = None) -> None:
        """Takes a target for the recall, or None for the settings above.

        Raises:
          UserError: ScaNN cannot be imported, or `recall` is not above 0 and at most 1.
        """
        reason = why_unavailable()
        if reason is not None:
            raise UserError(reason)
        if recall is not None and not 0 < recall <= 1:
            raise UserError(f"recall={recall} must be above 0 and at most 1")
        super().__init__()
        self.tree_from, self.recall = tree_from, recall
        self.tuned: tuple[Setting, ...] = ()  # by k
        self._searcher: Any = None  # None while empty: ScaNN cannot search nothing
        self._leaves = 0  # 0: exhaustive
        # since the structure was built or read: ScaNN gives no vector back
        self._added: dict[str, np.ndarray] = {}

    @property
    def how(self) -> str:
        """States how neighbours are chosen, in words."""
        if not self._leaves:
            return "ScaNN: exhaustive, every vector is scored"
        tree = f"ScaNN: a tree of {self._leaves} leaves, scores exact"
        reached = (
            f"recall@{tuned.k} {tuned.recall:.3f} in {tuned.leaves} of them, {tuned.reorder} scored again"
            for tuned in self.tuned
        )
        return "; ".join([tree, *reached, *([f"target {self.recall}"] if self.tuned else [])])

    def fields(self) -> dict[str, Any]:
        """Returns what a manifest says of the vectors, and of the recall asked for and measured."""
        tuned = [dataclasses.asdict(setting) for setting in self.tuned]
        aim = {} if self.recall is None else {"recall": self.recall, "tuned": tuned}
        return {**super().fields(), **aim}

    def _build(self, ids: list[str], vectors_NxD: np.ndarray) -> None:
        n = len(ids)
        self._searcher, self._leaves, self.tuned = None, 0, ()
        self._added = {}
        if n == 0:
            return
        if n >= self.tree_from:
            self._leaves = round(math.sqrt(n))
        if not self._leaves or self.recall is None:
            self._searcher = self._built(ids, vectors_NxD)
            return
        kept, held_out = split_rows(n)
        vectors_KxD, queries_QxD = vectors_NxD[kept], vectors_NxD[held_out]
        self._searcher = self._built([ids[row] for row in kept], vectors_KxD)
        self.tuned = tune(self._found, vectors_KxD, queries_QxD, self._leaves, self.recall)
        self._searcher.upsert([ids[row] for row in held_out], queries_QxD, len(held_out))
        for tuned in self.tuned:
            if tuned.recall < self.recall:
                say(
                    "search",
                    f"recall@{tuned.k} is {tuned.recall:.3f} with all leaves, below --recall={self.recall}; --engine=exact finds every neighbour",
                )

    def _built(self, ids: list[str], vectors_NxD: np.ndarray) -> Any:
        from scann import scann_ops_pybind

        builder = scann_ops_pybind.builder(vectors_NxD, REORDERED, "dot_product")
        if self._leaves:
            builder = builder.tree(self._leaves, self._leaves_to_search(len(ids), 1))
            builder = builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(REORDERED)
        else:
            builder = builder.score_brute_force()
        return builder.build(docids=list(ids))

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
            self._searcher, self._leaves, self.tuned = None, 0, ()
        else:
            self._searcher.delete(ids)

    def _search(self, queries_QxD: np.ndarray, k: int) -> tuple[list[list[str]], np.ndarray]:
        rows_QxK, scores_QxK = self._found(queries_QxD, k, *self.settings(k))
        # Where those leaves hold fewer than k vectors, ScaNN fills up with NaN: look into all of
        # them.
        short = np.flatnonzero(np.isnan(scores_QxK[:, -1]))
        if len(short):
            rows_QxK[short], scores_QxK[short] = self._found(
                queries_QxD[short], k, len(self), self._leaves
            )
        # Of Python's numbers a list is read three times as fast as of NumPy's.
        ids = self._searcher.docids
        return [[ids[row] for row in rows] for rows in rows_QxK.tolist()], scores_QxK

    def _found(
        self, queries_QxD: np.ndarray, k: int, reorder: int, leaves: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows and scores `[Q, k]`, best first, NaN where the leaves hold fewer vectors."""
        searcher = self._searcher.searcher  # the outer one maps ids number by number
        if len(queries_QxD) > 1:
            return searcher.search_batched(queries_QxD, k, reorder, leaves, True, 64)
        # To start threads would take a tenth of such a search.
        rows_F, scores_F = searcher.search(queries_QxD[0], k, reorder, leaves)
        if len(rows_F) == k:
            return rows_F[None], scores_F[None]
        rows_1xK, scores_1xK = np.zeros((1, k), np.uint32), np.full((1, k), np.nan, np.float32)
        rows_1xK[0, : len(rows_F)], scores_1xK[0, : len(rows_F)] = rows_F, scores_F
        return rows_1xK, scores_1xK

    def settings(self, k: int) -> tuple[int, int]:
        """Vectors to score again, and leaves to look into, for `k` neighbours; ScaNN's own (-1)
        where the search is exhaustive."""
        if not self._leaves:
            return -1, -1
        n = len(self)
        for tuned in self.tuned:
            if k <= tuned.k:
                return min(n, tuned.reorder), tuned.leaves
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
        self._leaves, self.recall, self.tuned = manifest.leaves, manifest.recall, manifest.tuned
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
