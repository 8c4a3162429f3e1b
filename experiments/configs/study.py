"""The configuration of `experiments.study`: its flags and their only defaults."""

from __future__ import annotations

import dataclasses

from experiments.configs.compare import Compare
from kafjax.core.config import Config, changed, nested, option

SIZE = {
    "subjects": 24,
    "development": 8,
    "documents": 5,
    "epochs": 10,
    "questions_per_fact": 1,
    "corpus_seed": 0,
    "latency_queries": 0,
    "runs": "runs/study",
}
"""Settings of its comparisons that differ from the defaults, by flag."""


@dataclasses.dataclass(frozen=True)
class Study(Config):
    """The protocol of docs/protocol.md from end to end."""

    compare: Compare = nested(
        changed(Compare(), **SIZE),
        without=("methods", "profile", "ask", "latency_queries", "index", "budget", "seed", "name"),
    )
    seeds: int = option(5, "Seeds of the trainings whose results are stated.", least=1, most=100)
    trials: int = option(
        5,
        "Settings that are tried for each arm on development subjects: as many for reading as for each training.",
        least=3,
        most=7,
    )
    most_forgotten: float = option(
        0.1,
        "The second choice of each trained arm forgets at most so many nats a token of prose.",
        least=0,
    )
    out: str = option(
        "docs/results/study", "Folder of the tables, figures and raw results.", path=True
    )
    dry_run: bool = option(False, "Say what is left to run and how long it may take.", record=False)
