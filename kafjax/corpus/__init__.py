"""What there is to learn: documents, passages, and questions about them."""

from kafjax.corpus.biographies import biographies, control
from kafjax.corpus.chunking import chunk, sentences
from kafjax.corpus.config import NAMES, CorpusConfig
from kafjax.corpus.factbook import capitals, factbook, prose
from kafjax.corpus.folder import load_folder, load_passages, save_folder
from kafjax.corpus.load import load, open_corpus

__all__ = [
    "NAMES",
    "CorpusConfig",
    "biographies",
    "capitals",
    "chunk",
    "control",
    "factbook",
    "load",
    "load_folder",
    "load_passages",
    "open_corpus",
    "prose",
    "save_folder",
    "sentences",
]
