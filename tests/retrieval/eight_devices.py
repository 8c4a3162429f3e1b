"""Prints what the mesh engine finds on the devices there are, after changes, a line of ids for each
stored type; then a line of vectors that an encoder makes.

python eight_devices.py ENCODER
"""

from __future__ import annotations

import json
import sys

import jax
import numpy as np

from kafjax import hub
from kafjax.retrieval import Embedder, MeshIndex


def found(dtype: str) -> tuple[list[list[str]], np.ndarray]:
    rng = np.random.default_rng(0)
    vectors, queries = rng.normal(size=(5000, 24)), rng.normal(size=(70, 24))
    index = MeshIndex(dtype)
    index.build([f"p{i}" for i in range(3000)], vectors[:3000])
    index.append([f"p{i}" for i in range(3000, 5000)], vectors[3000:])
    index.delete([f"p{i}" for i in range(0, 5000, 7)])
    index.upsert(["p1", "new"], vectors[:2])
    return index.search(queries, 20)


def embedded(folder: str) -> np.ndarray:
    """Vectors of 37 texts of several lengths, by batches that are split over the devices."""
    embedder = Embedder(*hub.load(folder), hub.tokenizer(folder), batch=8)
    return embedder.embed(["bees winter in the mill " * (1 + i % 5) for i in range(37)])


if __name__ == "__main__":
    assert jax.device_count() == 8
    for name in ("float32", "bfloat16", "int8"):
        print(json.dumps(found(name)[0]))
    print(json.dumps(embedded(sys.argv[1]).tolist()))
