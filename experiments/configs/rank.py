"""The configuration of `scripts/rank.py`."""

from __future__ import annotations

import dataclasses

from kafjax.core.config import Config, nested, option
from kafjax.corpus import CorpusConfig
from kafjax.retrieval.config import RetrievalConfig


@dataclasses.dataclass(frozen=True)
class Rank(Config):
    """The ranking of a corpus's documents for each of its questions, without a language model."""

    corpus: CorpusConfig = nested(
        CorpusConfig(retention=0, held_out=0), without=("retention", "held_out")
    )
    retrieval: RetrievalConfig = nested(RetrievalConfig(k=10))
    seed: int = option(0, "Seed of a generated corpus.", least=0, most=2**31 - 1)
    out: str | None = option(
        None,
        "Folder for run.trec and retrieval.json (default: scores are only printed).",
        record=False,
        path=True,
    )
