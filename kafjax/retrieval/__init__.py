"""Passages by meaning: embed, index, find. Each engine keeps vectors under string ids and grows without a rebuild."""

from kafjax.retrieval.base import Index
from kafjax.retrieval.embed import Embedder
from kafjax.retrieval.exact import ExactIndex
from kafjax.retrieval.index import ENGINES, load_index, open_index
from kafjax.retrieval.scann_index import ScannIndex
from kafjax.retrieval.store import Store

__all__ = ["ENGINES", "Embedder", "ExactIndex", "Index", "ScannIndex", "Store", "load_index", "open_index"]
