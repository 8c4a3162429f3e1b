"""Loading of any corpus by its name or directory."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kafjax.core.errors import UserError, nearest
from kafjax.core.records import Corpus, Document, Question
from kafjax.corpus.biographies import biographies, control
from kafjax.corpus.config import NAMES, CorpusConfig
from kafjax.corpus.factbook import capital_halves, factbook, prose
from kafjax.corpus.folder import corpus_name, load_folder, stream_folder
from kafjax.corpus.queries import queries
from kafjax.corpus.questions import NOT_ASKED
from kafjax.corpus.retention import world_questions
from kafjax.corpus.tfds_in import PREFIX, load_tfds

_DEFAULT = CorpusConfig()


def open_corpus(config: CorpusConfig, seed: int = 0, *, needs_questions: bool = True) -> Corpus:
    """Loads the corpus of a configuration; see `load`. A generated one is drawn with the
    configuration's `corpus_seed`, or else with `seed`."""
    return load(
        config.corpus,
        n_subjects=config.subjects,
        n_development=config.development,
        n_controls=config.controls,
        n_attributes=config.attributes,
        n_documents=config.documents,
        questions_per_fact=config.questions_per_fact,
        seed=seed if config.corpus_seed is None else config.corpus_seed,
        chunk=config.chunk,
        n_retention=config.retention,
        n_held_out=config.held_out,
        needs_questions=needs_questions,
    )


@dataclasses.dataclass(frozen=True)
class CorpusStream:
    """A corpus for training: its documents, read once, and the questions asked afterwards.

    `documents` can be read once. `n_documents` is None where they have to be read to be counted.
    """

    name: str
    documents: Iterator[Document]
    n_documents: int | None
    training_questions: tuple[Question, ...]
    questions: tuple[Question, ...]


def stream_corpus(config: CorpusConfig, seed: int = 0) -> CorpusStream:
    """Opens a corpus for one pass over its documents. A directory's are read one at a time; other
    corpora are loaded as by `load`.

    Raises `UserError` as `load` does, about a directory's documents when they are reached.
    """
    if _is_directory(config.corpus):
        documents, questions = stream_folder(config.corpus)
        trained = tuple(q for q in questions if q.split == "train")
        asked = tuple(q for q in questions if q.split not in NOT_ASKED)
        return CorpusStream(corpus_name(config.corpus), documents, None, trained, asked)
    corpus = open_corpus(config, seed)
    n_documents = len(corpus.documents)
    return CorpusStream(
        corpus.name,
        iter(corpus.documents),
        n_documents,
        corpus.training_questions,
        corpus.questions,
    )


def load(
    source: str | os.PathLike[str],
    *,
    n_subjects: int = _DEFAULT.subjects,
    n_development: int = _DEFAULT.development,
    n_controls: int = _DEFAULT.controls,
    n_attributes: int = _DEFAULT.attributes,
    n_documents: int = _DEFAULT.documents,
    questions_per_fact: int = _DEFAULT.questions_per_fact,
    seed: int = 0,
    chunk: str | int | None = None,
    overlap: int = 0,
    n_retention: int = _DEFAULT.retention,
    n_held_out: int = _DEFAULT.held_out,
    needs_questions: bool = True,
) -> Corpus:
    """Loads a corpus and attaches what measures and softens forgetting.

    `source` is "biographies", "biographies-control" (its empty control), "factbook", "queries", a directory
    (see `folder`) or a TFDS dataset such as "tfds:squad" (see `tfds_in`); the counts and the seed
    of generated corpora do not concern the last two. `chunk` is a number of words, "sentence" or
    "document"; by default sentences, or what suits the documents of a directory. With
    `needs_questions=False` a directory of documents alone will do.

    Attached are `n_retention` questions about countries to ask before and after, `n_held_out` pieces
    of prose for perplexity, and `n_retention` each of such questions and of prose about other
    countries for replay. A
    directory's own retention questions, prose or replay come first; with all of them, or with
    `n_retention=0` and `n_held_out=0`, the World Factbook is not needed.

    Raises `UserError` if there is no such corpus (with the nearest name), or it is broken, or the
    World Factbook is not installed.
    """
    name = os.fspath(source)
    generated: dict[str, Any] = {
        "n_attributes": n_attributes,
        "n_documents": n_documents,
        "questions_per_fact": questions_per_fact,
        "seed": seed,
        "size": "sentence" if chunk is None else chunk,
        "overlap": overlap,
    }
    roles = {"n_development": n_development, "n_controls": n_controls, "supervised": True}
    if name == "biographies":
        corpus = biographies(n_subjects, **generated, **roles)
    elif name == "biographies-control":
        corpus = control(n_subjects, **generated)
    elif name == "factbook":
        # Training on a country must not touch what is asked about it for retention, so the corpus
        # takes others.
        exclude = {country.code for half in capital_halves(n_retention) for country in half}
        corpus = factbook(n_subjects, **generated, **roles, exclude=exclude)
    elif name == "queries":
        corpus = queries(n_subjects, n_attributes, seed)
    elif name.startswith(PREFIX):
        corpus = load_tfds(name, chunk, overlap)
    elif _is_directory(name):
        corpus = load_folder(name, chunk, overlap, needs_questions=needs_questions)
    else:
        raise UserError(f"unknown corpus '{name}', and no such directory. {nearest(name, NAMES)}")
    return _with_retention(corpus, n_retention, n_held_out)


def _is_directory(name: str) -> bool:
    return (
        name not in NAMES
        and not name.startswith(PREFIX)
        and (Path(name).exists() or os.sep in name)
    )


def _with_retention(corpus: Corpus, n_retention: int, n_held_out: int) -> Corpus:
    attached = {}
    if n_retention and not (corpus.retention and corpus.replay_questions):
        attached["retention"], attached["replay_questions"] = world_questions(n_retention)
    if (n_retention or n_held_out) and not (corpus.held_out_texts and corpus.replay_texts):
        attached["held_out_texts"], attached["replay_texts"] = prose(n_held_out, n_retention)
    return dataclasses.replace(
        corpus, **{key: value for key, value in attached.items() if not getattr(corpus, key)}
    )
