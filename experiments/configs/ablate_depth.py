"""The configuration of `experiments.ablate_depth`."""

from __future__ import annotations

import dataclasses

from experiments.configs.shared import MESH, ModelConfig, RunConfig
from kafjax.core.config import Config, nested, option
from kafjax.corpus import CorpusConfig
from kafjax.corpus.distractors import DISTRACTORS
from kafjax.methods import Settings


@dataclasses.dataclass(frozen=True)
class AblateDepth(Config):
    """One retrieving method at many depths: how many passages help, and what they cost."""

    model: ModelConfig = nested(ModelConfig())
    corpus: CorpusConfig = nested(CorpusConfig(), without=("controls",))
    method: str = option(
        "rag",
        "Whose answers: rag, hyde, rewrite, or WEIGHTS+READER, such as lora+rag; weights are trained first. reader+rag and raft+rag learn to read.",
    )
    depths: tuple[int, ...] = option(
        (0, 1, 2, 3, 5, 10, 20),
        "Depths: passages in the prompt, separated by commas.",
        least=0,
        most=10**4,
    )
    places: int = option(
        5,
        "Passages among which the one with the answer is put at each place, and left out; 0: neither.",
        least=0,
        most=10**3,
    )
    n_questions: int | None = option(
        None, "Ask at most so many questions, evenly spaced (default: all).", least=1
    )
    distractors: tuple[str, ...] = option(
        DISTRACTORS,
        "What stands beside the passage with the answer at its places: the best found without it (near), any others (random), "
        "or the near ones behind one that tells another answer (contradicting).",
        choices=DISTRACTORS,
    )
    seeds: tuple[int, ...] = option(
        (),
        "Seeds to run one after the other and to put into one table (default: --seed alone).",
        least=0,
        most=2**31 - 1,
        added=True,
        identity=False,
    )
    latency_queries: int = option(
        4,
        "Queries asked alone at each depth: for the latency, and to compare their replies with the shared ones.",
        least=0,
        most=10**6,
    )
    settings: Settings = nested(Settings(), without=("k",))
    mesh: str = option("auto", MESH, identity=False)
    run: RunConfig = nested(RunConfig())
