"""Corpora: documents, passages, and questions about them."""

from kafjax.corpus.biographies import biographies, control
from kafjax.corpus.chunking import chunk
from kafjax.corpus.config import NAMES, CorpusConfig
from kafjax.corpus.factbook import factbook, prose
from kafjax.corpus.folder import load_folder, load_passages, save_folder, stream_folder
from kafjax.corpus.load import CorpusStream, load, open_corpus, stream_corpus
from kafjax.corpus.questions import is_dealt, load_questions, save_questions
from kafjax.corpus.sentences import sentences

__all__ = [
    "NAMES",
    "CorpusConfig",
    "CorpusStream",
    "biographies",
    "chunk",
    "control",
    "factbook",
    "is_dealt",
    "load",
    "load_folder",
    "load_passages",
    "load_questions",
    "open_corpus",
    "prose",
    "save_folder",
    "save_questions",
    "sentences",
    "stream_corpus",
    "stream_folder",
]
