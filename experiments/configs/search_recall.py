"""The configuration of `experiments.search_recall`."""

from __future__ import annotations

import dataclasses

from experiments.configs.shared import RunConfig
from kafjax.core.config import Config, nested, option


@dataclasses.dataclass(frozen=True)
class SearchRecall(Config):
    """One way to find neighbours, measured against exact search."""

    how: str = option(
        "scann",
        "Search: ScaNN's tree, or bins, the algorithm of lax.approx_max_k on a TPU, which is exact elsewhere.",
        choices=("scann", "bins"),
    )
    vectors: int = option(20_000, "Vectors to search in.", least=1000, most=10**8)
    dimension: int = option(64, "Their dimension.", least=2, most=4096)
    clusters: int = option(200, "Clusters that they are drawn from.", least=1, most=10**6)
    queries: int = option(200, "Queries, drawn like the vectors.", least=2, most=10**5)
    k: int = option(10, "Neighbours that are counted.", least=1, most=1000)
    bins: int = option(128, "With --how=bins: maxima that are kept.", least=1, most=10**7)
    recall: float = option(
        0.95, "With --how=scann: the recall that the tree is tuned to.", above=0, most=1
    )
    grown: float = option(
        0.0,
        "With --how=scann: share of the vectors that is appended to a tree built without them.",
        least=0,
        below=1,
    )
    seed: int = option(0, "Seed of the vectors.", least=0, most=2**31 - 1)
    run: RunConfig = nested(RunConfig())
