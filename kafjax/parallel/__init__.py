"""Devices: the mesh, and the rules that lay parameters and batches over it."""

from kafjax.parallel.mesh import AXES, make_mesh
from kafjax.parallel.sharding import (
    BATCH_AXES,
    RULES,
    Constrain,
    n_data_shares,
    replicated,
    shard,
    shardings,
)

__all__ = [
    "AXES",
    "BATCH_AXES",
    "RULES",
    "Constrain",
    "make_mesh",
    "n_data_shares",
    "replicated",
    "shard",
    "shardings",
]
