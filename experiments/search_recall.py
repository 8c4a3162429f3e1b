"""Measures how many of the true neighbours a search finds, and how fast.

    python -m experiments.search_recall                          ScaNN's tree, tuned to a recall of 0.95
    python -m experiments.search_recall --recall=0.8             the same, less exact and faster
    python -m experiments.search_recall --grown=0.1              with a tenth of the vectors appended afterwards
    python -m experiments.search_recall --how=bins --bins=64     TPU-KNN's bins: the maximum of each, and the best of those

Vectors and queries are drawn from the same clusters on the unit sphere. The run's folder, runs/NAME,
holds config.json and found.json: of each query the number of true neighbours found, and queries a
second.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments import build
from experiments.configs.search_recall import SearchRecall
from kafjax.core.progress import say
from kafjax.core.rundir import environment, open_run, write_json
from kafjax.retrieval.index import open_index
from kafjax.retrieval.tuning import exact_neighbours

FOUND = "found.json"
TURNS = 5


def run(config: SearchRecall) -> Path:
    """Measures, unless an earlier start has, and returns the run's folder. Raises `UserError` for
    an engine that is not installed."""
    run = open_run(Path(config.run.runs), config.run.name, config, prefix="search")
    if run.file(FOUND).exists():
        say("search", f"measured earlier; delete {run.path} to measure again")
        return run.path
    vectors_NxD, queries_QxD = clustered_vectors(config)
    _, true_QxK = exact_neighbours(vectors_NxD, queries_QxD, config.k)
    search = _bins(config, vectors_NxD) if config.how == "bins" else _scann(config, vectors_NxD)
    found_QxK = search(queries_QxD)
    hits_Q = [
        len(set(map(int, true)) & set(map(int, found)))
        for true, found in zip(true_QxK, found_QxK, strict=True)
    ]
    seconds = []
    for _ in range(TURNS):
        began = time.perf_counter()
        search(queries_QxD)
        seconds.append(time.perf_counter() - began)
    rate = len(queries_QxD) / statistics.median(seconds)
    contents = {"hits": hits_Q, "queries_per_second": rate, "environment": environment()}
    write_json(run.file(FOUND), contents)
    print(
        f"recall@{config.k} {sum(hits_Q) / len(hits_Q) / config.k:.3f}, {rate:,.0f} queries/s; "
        f"look at {run.file(FOUND)}"
    )
    return run.path


def clustered_vectors(config: SearchRecall) -> tuple[np.ndarray, np.ndarray]:
    """Draws vectors `[N, D]` and queries `[Q, D]` of length 1 around the same centres."""
    rng = np.random.default_rng(config.seed)
    centres_CxD = rng.standard_normal((config.clusters, config.dimension), np.float32)

    def drawn(n: int) -> np.ndarray:
        noise_NxD = rng.standard_normal((n, config.dimension), np.float32)
        x_NxD = centres_CxD[rng.integers(config.clusters, size=n)] + 2 * noise_NxD
        return x_NxD / np.linalg.norm(x_NxD, axis=1, keepdims=True)

    return drawn(config.vectors), drawn(config.queries)


def _bins(config: SearchRecall, vectors_NxD: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a search that keeps the maximum of each of `bins` bins of random vectors (Chern et
    al. 2022, "TPU-KNN", algorithm 1), written out, since `lax.approx_max_k` is exact here."""
    order_N = np.random.default_rng(config.seed + 1).permutation(len(vectors_NxD))
    order_N = order_N[: len(order_N) // config.bins * config.bins]
    order_MxB = jnp.asarray(order_N.reshape(config.bins, -1))

    def search(queries_QxD: np.ndarray) -> np.ndarray:
        scores_QxN = jnp.asarray(queries_QxD) @ jnp.asarray(vectors_NxD).T
        scores_QxMxB = scores_QxN[:, order_MxB]
        best_QxM = scores_QxMxB.argmax(-1)
        rows_QxM = jnp.take_along_axis(order_MxB[None], best_QxM[..., None], 2)[..., 0]
        _, at_QxK = lax.top_k(scores_QxMxB.max(-1), min(config.k, config.bins))
        return np.asarray(jnp.take_along_axis(rows_QxM, at_QxK, 1))

    return search


def _scann(config: SearchRecall, vectors_NxD: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a search by ScaNN's tree; the last `grown` of the vectors are appended to it."""
    ids = [str(row) for row in range(len(vectors_NxD))]
    first = round(len(ids) * (1 - config.grown))
    index = open_index("scann", config.recall)
    index.build(ids[:first], vectors_NxD[:first])
    if first < len(ids):
        index.append(ids[first:], vectors_NxD[first:])

    def search(queries_QxD: np.ndarray) -> np.ndarray:
        return np.asarray(index.search(queries_QxD, config.k)[0], dtype=int)

    return search


def main() -> None:
    build.start(SearchRecall, run)


if __name__ == "__main__":
    main()
