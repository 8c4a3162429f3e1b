"""The kinds of retriever by name: builds the store that one needs, and opens it.

store = build_store(passages, "dense", "auto", lambda: embedder)
retriever = open_retriever(store, "hybrid", lambda: embedder)
(hits,) = retriever.search(["Who makes maps?"], k=5)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from kafjax.core.errors import UserError, nearest
from kafjax.core.progress import Advance, unshown
from kafjax.core.records import Passage
from kafjax.retrieval.dense import Dense
from kafjax.retrieval.embed import Embedder
from kafjax.retrieval.hybrid import Hybrid
from kafjax.retrieval.index import open_index
from kafjax.retrieval.lexical import Lexical, check_installed
from kafjax.retrieval.parts import embed_in_parts
from kafjax.retrieval.rerank import CrossScorer, Reranked
from kafjax.retrieval.retriever import Retriever
from kafjax.retrieval.store import Store, check_texts

DENSE, LEXICAL, HYBRID = "dense", "lexical", "hybrid"
KINDS = (DENSE, LEXICAL, HYBRID)


def build_store(
    passages: Sequence[Passage],
    kind: str,
    engine: str,
    open_embedder: Callable[[], Embedder],
    advance: Advance = unshown,
    parts: Path | None = None,
    recall: float | None = None,
) -> Store:
    """Builds what a kind of retriever keeps. A dense store serves every kind; a lexical one has no
    vectors and serves that kind alone.

        >>> len(build_store([Passage("a", "Mira draws maps.")], LEXICAL, "auto", lambda: None))
        1

    Args:
      engine: of the vectors' index, a name in `ENGINES`.
      open_embedder: called only where vectors are made.
      advance: told of every n passages embedded.
      parts: folder that keeps what is embedded, so that a killed build goes on from there; the
        caller deletes it once the store is saved.
      recall: target of ScaNN's tree; None: half of the leaves.

    Raises:
      UserError: an unknown kind or engine, ids that are not unique strings, a passage that is empty or
        that the encoder cannot read.
    """
    check_kind(kind)
    check_texts(passages)  # before hours of embedding
    if kind == LEXICAL:
        return Store(None, passages)
    index, embedder = open_index(engine, recall), open_embedder()
    vectors_NxD = embed_passages(embedder, passages, advance, parts)
    index.build([passage.id for passage in passages], vectors_NxD)
    return Store(index, passages, embedder.fingerprint)


def changes(store: Store, passages: Sequence[Passage]) -> tuple[list[str], list[Passage]]:
    """Compares a store with the passages that it should hold. Returns the ids that are gone, and
    passages that are new or changed.

    The place that a passage was read from is no part of what it is.
    """
    wanted, held = {passage.id for passage in passages}, set(store.ids)
    new = [
        passage
        for passage in passages
        if passage.id not in held or store.passage(passage.id) != passage
    ]
    return [id for id in store.ids if id not in wanted], new


def embed_passages(
    embedder: Embedder,
    passages: Sequence[Passage],
    advance: Advance = unshown,
    parts: Path | None = None,
) -> np.ndarray:
    """Embeds the texts of passages, float32 `[N, D]`, from and into the folder `parts` where one is
    given. Raises `UserError` as `Embedder.embed` does."""
    texts = [passage.text for passage in passages]
    if parts is None:
        return embedder.embed_documents(texts, advance)
    return embed_in_parts(embedder, texts, parts, advance)


def open_retriever(
    store: Store,
    kind: str,
    open_embedder: Callable[[], Embedder],
    scorer: CrossScorer | None = None,
    candidates: int = 50,
    dense_weight: float | None = None,
) -> Retriever:
    """Opens a store for searching, with a cross-encoder around it where there is one.

    Args:
      dense_weight: share of a hybrid's score that is by meaning; None: ranks are fused.

    Raises:
      UserError: an unknown kind, one that needs vectors where the store has none, or a missing
        package.
    """
    check_kind(kind)
    if kind != LEXICAL and store.index is None:
        raise UserError(
            f"--retriever={kind} needs vectors, these passages have none; search with --retriever=lexical, or build them again"
        )
    if kind == LEXICAL:
        retriever: Retriever = Lexical(store)
    elif kind == DENSE:
        retriever = Dense(store, open_embedder())
    else:
        weights = None if dense_weight is None else (dense_weight, 1 - dense_weight)
        retriever = Hybrid(Dense(store, open_embedder()), Lexical(store), weights=weights)
    return retriever if scorer is None else Reranked(retriever, scorer, candidates)


def check_kind(kind: str) -> None:
    """Raises `UserError` for an unknown kind, and for one whose package is not installed."""
    if kind not in KINDS:
        raise UserError(f"unknown retriever '{kind}'. {nearest(kind, KINDS)}")
    if kind != DENSE:
        check_installed()
