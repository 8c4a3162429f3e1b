"""Settings of the corpus: which one, and the size of a generated one. Their only defaults."""

from __future__ import annotations

import dataclasses

from kafjax.core.config import Config, option

NAMES = ("biographies", "biographies-control", "factbook", "queries")
"""Corpora that are generated, at any size."""


@dataclasses.dataclass(frozen=True)
class CorpusConfig(Config):
    """The corpus, and the questions asked beside it to measure forgetting. `corpus.load` opens
    it."""

    corpus: str = option(
        "biographies",
        "biographies (invented people), factbook (CIA), queries (a task of form), a folder with your documents and questions.jsonl, "
        "or a TFDS dataset (tfds:squad).",
        path=True,
    )
    subjects: int = option(
        24,
        "People, countries or tables of a generated corpus; half of them have training questions.",
        least=2,
        most=10**6,
    )
    development: int = option(
        0,
        "People or countries beside --subjects of which only documents are trained: settings are chosen by the questions about them.",
        least=0,
        most=10**6,
        added=True,
    )
    controls: int = option(
        0,
        "People or countries of a generated corpus that are asked about, and are in no document.",
        least=0,
        most=1000,
        added=True,
    )
    attributes: int = option(
        3,
        "Facts per person or country, or questions per table, of a generated corpus.",
        least=1,
        most=1000,
    )
    documents: int = option(
        5,
        "Documents per person or country, each stating every fact in other words.",
        least=1,
        most=1000,
    )
    questions_per_fact: int = option(
        1, "Wordings of the training question of each fact.", least=1, most=1000
    )
    retention: int = option(
        32,
        "Questions about countries (capital, currency, continent) that measure forgetting; as many others are there for replay.",
        least=0,
        most=1000,
    )
    held_out: int = option(
        8, "Pieces of ordinary prose whose perplexity is measured.", least=0, most=1000
    )
    chunk: str | None = option(
        None,
        "Retrieval unit: sentence, document, or a number of words (default: sentence; in a folder short documents stay whole, "
        "longer ones are cut into some 64 words).",
    )
    corpus_seed: int | None = option(
        None,
        "Seed that a generated corpus is drawn with (default: that of --seed). With one corpus for all seeds, "
        "the spread between seeds is that of training.",
        least=0,
        most=2**31 - 1,
        added=True,
    )

    @property
    def is_generated(self) -> bool:
        """True if the name and the numbers determine the contents."""
        return self.corpus in NAMES

    @property
    def document_parts(self) -> int:
        """Epochs that read the corpus once: a generated one says everything `documents` times, and
        an epoch reads one telling."""
        return self.documents if self.is_generated else 1
