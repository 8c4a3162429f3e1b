"""TFDS builder of the CIA World Factbook's facts."""

from __future__ import annotations

from kafjax.core.records import Corpus
from kafjax.corpus.builders.generated import Counts, Generated
from kafjax.corpus.factbook import factbook


class Factbook(Generated):
    """Countries with facts that a small model does not know, told in documents and asked in
    questions."""

    BUILDER_CONFIGS = [Counts()]  # noqa: RUF012  TFDS reads it from the class

    def corpus(self) -> Corpus:
        return factbook(self.builder_config.n_subjects, **self.builder_config.arguments())
