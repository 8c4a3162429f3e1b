"""Settings of retrieval, with their only defaults."""

from __future__ import annotations

import dataclasses

from kafjax.core.config import Config, option
from kafjax.retrieval.index import ENGINES


@dataclasses.dataclass(frozen=True)
class RetrievalConfig(Config):
    """The encoder, the index, and the number of passages."""

    embedder: str = option("minilm", "Retrieval: embedding model: minilm, a folder of a BERT model, or ORG/NAME of the hub.", path=True)
    engine: str = option("auto", "Retrieval: index engine; auto is ScaNN where it is installed, else exact.", choices=ENGINES)
    k: int = option(5, "Retrieval: passages put in the prompt.", least=1, most=10**6)
