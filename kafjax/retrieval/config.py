"""Settings of retrieval, with their only defaults."""

from __future__ import annotations

import dataclasses

from kafjax.core.config import Config, option
from kafjax.retrieval.embed import AUTO, DTYPES
from kafjax.retrieval.index import ENGINES
from kafjax.retrieval.kinds import DENSE, KINDS


@dataclasses.dataclass(frozen=True)
class RetrievalConfig(Config):
    """The encoder, the index, and the number of passages."""

    embedder: str = option(
        "minilm",
        "Retrieval: embedding model: minilm, a folder of a BERT model, or ORG/NAME of the hub.",
        path=True,
    )
    embedder_dtype: str = option(
        "float32",
        "Retrieval: type of the embedding model's products. auto: the faster one here, measured; vectors of two types differ in the third decimal, "
        "and an index keeps to one.",
        choices=(*DTYPES, AUTO),
        added=True,
    )
    engine: str = option(
        "auto",
        "Retrieval: index engine; auto is ScaNN where it is installed, else exact.",
        choices=ENGINES,
    )
    recall: float | None = option(
        None,
        "Retrieval: recall that a new ScaNN index of 10,000 passages or more aims at, such as 0.95, measured as it is built; the lower, the faster. "
        "Default: half of its leaves, nearly 1.",
        above=0,
        most=1,
        added=True,
    )
    k: int = option(5, "Retrieval: passages put in the prompt.", least=1, most=10**6)
    retriever: str = option(
        DENSE,
        "Retrieval: by meaning (dense), by words (lexical: BM25), or by both, ranks fused (hybrid).",
        choices=KINDS,
        added=True,
    )
    dense_weight: float | None = option(
        None,
        "Retrieval: share of a hybrid's score that is by meaning, the rest by words, each stretched to 0 to 1. Default: ranks are fused.",
        least=0,
        most=1,
        added=True,
    )
    best_last: bool = option(
        True,
        "Retrieval: the best passage stands last in the prompt, next to the question; else first.",
        added=True,
    )
    reranker: str | None = option(
        None,
        "Retrieval: cross-encoder that reads what was found again and keeps the best k: a folder of a BERT classifier, or ORG/NAME.",
        path=True,
        added=True,
    )
    candidates: int = option(
        50,
        "Retrieval: passages that --reranker reads for a question.",
        least=1,
        most=10**6,
        added=True,
    )
