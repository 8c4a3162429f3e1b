"""Passages found by meaning, by words, or by both, and read again: `Retriever.search(texts, k)`
gives hits with their scores.

An engine keeps vectors under string ids and grows without a rebuild; a `Store` keeps them beside
the passages.
"""

from kafjax.retrieval.base import Index
from kafjax.retrieval.dense import Dense
from kafjax.retrieval.embed import Embedder
from kafjax.retrieval.exact import ExactIndex
from kafjax.retrieval.hybrid import Hybrid, fuse
from kafjax.retrieval.index import ENGINES, load_index, open_index
from kafjax.retrieval.kinds import KINDS, build_store, open_retriever
from kafjax.retrieval.lexical import Lexical
from kafjax.retrieval.mesh_index import MeshIndex
from kafjax.retrieval.rerank import CrossScorer, Reranked, open_scorer
from kafjax.retrieval.retriever import Hit, Retriever
from kafjax.retrieval.scann_index import ScannIndex
from kafjax.retrieval.store import Store

__all__ = [
    "ENGINES",
    "KINDS",
    "CrossScorer",
    "Dense",
    "Embedder",
    "ExactIndex",
    "Hit",
    "Hybrid",
    "Index",
    "Lexical",
    "MeshIndex",
    "Reranked",
    "Retriever",
    "ScannIndex",
    "Store",
    "build_store",
    "fuse",
    "load_index",
    "open_index",
    "open_retriever",
    "open_scorer",
]
