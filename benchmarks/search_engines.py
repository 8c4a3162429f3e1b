"""The engines that `benchmarks.search` compares, in one form: rows are numbered as they were given.

Each peer is used as its documentation recommends for this size: ScaNN with a tree of sqrt(N)
leaves, asymmetric hashing and reordering; faiss with its nearest equivalent, an inverted file of 4
bit product codes with refinement; hnswlib and usearch as graphs of 16 neighbours.
"""

from __future__ import annotations

import abc
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from kafjax.retrieval import load_index
from kafjax.retrieval.scann_index import ScannIndex

K = 10
RECALL = 0.95
SEARCHED = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)  # shares of the lists
VISITED = (10, 15, 20, 30, 40, 60, 80, 120, 160, 240, 320, 640)  # nodes of a graph
REORDERED = 100
THREADS = os.cpu_count() or 1


class Engine(abc.ABC):
    """`grid` has the settings from fast to slow; `set` chooses one."""

    grid: tuple[Any, ...]

    @abc.abstractmethod
    def build(self, vectors: np.ndarray) -> None: ...

    @abc.abstractmethod
    def save(self, path: Path) -> None: ...

    @abc.abstractmethod
    def open(self, path: Path) -> None: ...

    @abc.abstractmethod
    def set(self, setting: Any) -> None: ...

    @abc.abstractmethod
    def search(self, queries: np.ndarray) -> np.ndarray:
        """Rows of the K nearest, int `[Q, K]`, by all threads."""

    def single(self, query: np.ndarray) -> Any:
        """The same for one query."""
        return self.search(query)

    @abc.abstractmethod
    def append(self, vectors: np.ndarray) -> None: ...


class Kafjax(Engine):
    """Our index as it is by default: it stands at its own setting."""

    grid = ("its own",)
    recall: float | None = None

    def build(self, vectors: np.ndarray) -> None:
        self.index = ScannIndex(recall=self.recall)
        self.index.build([str(i) for i in range(len(vectors))], vectors)

    def save(self, path: Path) -> None:
        self.index.save(path)

    def open(self, path: Path) -> None:
        self.index = load_index(path)

    def set(self, setting: str) -> None:
        pass

    def search(self, queries: np.ndarray) -> np.ndarray:
        ids, _ = self.index.search(queries, K)
        return np.array(ids).astype(int)

    def single(self, query: np.ndarray) -> Any:
        return self.index.search(query, K)

    def raw(self, queries: np.ndarray) -> Any:
        """ScaNN itself, under the index, with the settings that the index takes for this k."""
        searcher, settings = self.index._searcher, self.index.settings(K)
        if len(queries) == 1:
            return searcher.search(queries[0], K, *settings)
        return searcher.search_batched_parallel(queries, K, *settings, batch_size=64)

    def append(self, vectors: np.ndarray) -> None:
        first = len(self.index)
        self.index.append([str(first + i) for i in range(len(vectors))], vectors)


class KafjaxAtRecall(Kafjax):
    """Our index as `--recall=0.95` builds it: tuned on vectors of its own, not on the queries that
    peers are tuned on."""

    grid = (f"--recall={RECALL}",)
    recall = RECALL


class Scann(Engine):
    grid = SEARCHED

    def build(self, vectors: np.ndarray) -> None:
        from scann import scann_ops_pybind

        self.leaves = round(math.sqrt(len(vectors)))
        builder = scann_ops_pybind.builder(vectors, K, "dot_product").tree(self.leaves, 1)
        builder = builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(REORDERED)
        self.searcher = builder.build(docids=[str(i) for i in range(len(vectors))])

    def save(self, path: Path) -> None:
        self.searcher.serialize(str(path), True)

    def open(self, path: Path) -> None:
        from scann import scann_ops_pybind

        self.searcher = scann_ops_pybind.load_searcher(str(path), assets_backcompat_shim=False)
        self.leaves = round(math.sqrt(self.searcher.size()))

    def set(self, setting: float) -> None:
        self.searched = math.ceil(setting * self.leaves)

    def search(self, queries: np.ndarray) -> np.ndarray:
        ids, _ = self.searcher.search_batched_parallel(
            queries, K, REORDERED, self.searched, batch_size=64
        )
        return np.array(ids).astype(int)

    def single(self, query: np.ndarray) -> Any:
        return self.searcher.search(query[0], K, REORDERED, self.searched)

    def append(self, vectors: np.ndarray) -> None:
        first = self.searcher.size()
        ids = [str(first + i) for i in range(len(vectors))]
        self.searcher.upsert(ids, vectors, batch_size=len(ids))


class Faiss(Engine):
    grid = SEARCHED

    def build(self, vectors: np.ndarray) -> None:
        import faiss

        n, d = vectors.shape
        form = f"IVF{round(math.sqrt(n))},PQ{d // 2}x4fs,RFlat"
        self.index = faiss.index_factory(d, form, faiss.METRIC_INNER_PRODUCT)
        self.index.train(vectors)
        self.index.add(vectors)

    def save(self, path: Path) -> None:
        import faiss

        faiss.write_index(self.index, str(path / "index.faiss"))

    def open(self, path: Path) -> None:
        import faiss

        self.index = faiss.read_index(str(path / "index.faiss"))

    def set(self, setting: float) -> None:
        import faiss

        self.index.k_factor = REORDERED / K
        lists = faiss.extract_index_ivf(self.index)
        lists.nprobe = math.ceil(setting * lists.nlist)

    def search(self, queries: np.ndarray) -> np.ndarray:
        return self.index.search(queries, K)[1]

    def append(self, vectors: np.ndarray) -> None:
        self.index.add(vectors)


class Hnswlib(Engine):
    grid = VISITED

    def build(self, vectors: np.ndarray) -> None:
        import hnswlib

        self.index = hnswlib.Index("ip", vectors.shape[1])
        self.index.init_index(len(vectors), ef_construction=100, M=16)
        self.index.add_items(vectors)

    def save(self, path: Path) -> None:
        (path / "dimension").write_text(str(self.index.dim))
        self.index.save_index(str(path / "index.hnsw"))

    def open(self, path: Path) -> None:
        import hnswlib

        self.index = hnswlib.Index("ip", int((path / "dimension").read_text()))
        self.index.load_index(str(path / "index.hnsw"))

    def set(self, setting: int) -> None:
        self.index.set_ef(setting)

    def search(self, queries: np.ndarray) -> np.ndarray:
        return self.index.knn_query(queries, K)[0].astype(int)

    def append(self, vectors: np.ndarray) -> None:
        self.index.resize_index(self.index.element_count + len(vectors))
        self.index.add_items(vectors)


class Usearch(Engine):
    grid = VISITED

    def build(self, vectors: np.ndarray) -> None:
        from usearch.index import Index

        self.index = Index(ndim=vectors.shape[1], metric="ip", dtype="f32", connectivity=16)
        self.index.add(np.arange(len(vectors)), vectors, threads=THREADS)

    def save(self, path: Path) -> None:
        self.index.save(str(path / "index.usearch"))

    def open(self, path: Path) -> None:
        from usearch.index import Index

        self.index = Index.restore(str(path / "index.usearch"))

    def set(self, setting: int) -> None:
        self.index.expansion_search = setting

    def search(self, queries: np.ndarray) -> np.ndarray:
        keys = self.index.search(queries, K, threads=THREADS).keys
        return np.asarray(keys).reshape(len(queries), K).astype(int)

    def append(self, vectors: np.ndarray) -> None:
        first = len(self.index)
        self.index.add(np.arange(first, first + len(vectors)), vectors, threads=THREADS)


ENGINES: dict[str, type[Engine]] = {
    "kafjax": Kafjax,
    f"kafjax-{RECALL}": KafjaxAtRecall,
    "scann": Scann,
    "faiss": Faiss,
    "hnswlib": Hnswlib,
    "usearch": Usearch,
}
