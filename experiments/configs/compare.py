"""The configuration of `experiments.compare`."""

from __future__ import annotations

import dataclasses

from experiments.configs.shared import MESH, ModelConfig, RunConfig, budget_flag, index_flag
from kafjax.core.config import Config, nested, option
from kafjax.corpus import CorpusConfig
from kafjax.methods import METHODS, Settings

PROFILES = {
    "smoke": {
        "subjects": 4,
        "attributes": 3,
        "retention": 6,
        "held_out": 2,
        "epochs": 5,
        "controls": 1,
        "realign": 0,
        "latency_queries": 1,
    },
    "default": {},
    "large": {
        "subjects": 200,
        "attributes": 6,
        "retention": 70,
        "held_out": 40,
        "batch_rows": 8,
        "latency_queries": 100,
    },
}
"""Values by flag that differ from the defaults. `default` is made for two cores and twenty
minutes."""


@dataclasses.dataclass(frozen=True)
class Compare(Config):
    """All ways to add knowledge, on one corpus and one bill.

    Of 24 subjects 12 are the headline's, as many as its tests need; each fact is told 10 times
    (docs/protocol.md).
    """

    model: ModelConfig = nested(ModelConfig())
    corpus: CorpusConfig = nested(CorpusConfig(controls=4))
    settings: Settings = nested(Settings())
    mesh: str = option("auto", MESH, identity=False)
    methods: tuple[str, ...] = option(
        METHODS,
        "Methods to compare: base, full, lora (or a variant: rslora, dora, pissa, olora); oracle, rag, hyde; or WEIGHTS+READER, "
        "such as dora+rag. Weights that train have regimes: lora-documents, lora-supervised, lora-single (docs/protocol.md).",
        identity=False,
    )
    profile: str = option(
        "default",
        "Size of the comparison; flags given explicitly win over it.",
        choices=tuple(PROFILES),
        identity=False,
    )
    latency_queries: int = option(
        12, "Queries asked one at a time to measure the latency.", least=0, most=10**6
    )
    ask: tuple[str, ...] = option(
        (),
        "Splits of questions about the documents to ask (default: all): development, where settings are chosen.",
        added=True,
    )
    realign: int = option(
        10,
        "Questions on other matters that trained weights learn before retention is asked again: what comes back was not lost. 0: none.",
        least=0,
        most=1000,
    )
    index: str | None = index_flag(
        "Folder of experiments.build_index with the passages of --corpus: searched instead of embedding them again."
    )
    budget: str | None = budget_flag()
    run: RunConfig = nested(RunConfig())
