"""TFDS builder of the invented people."""

from __future__ import annotations

from kafjax.core.records import Corpus
from kafjax.corpus.biographies import biographies
from kafjax.corpus.builders.generated import Counts, Generated


class Biographies(Generated):
    """Invented people with a few facts each, told in documents and asked in questions."""

    BUILDER_CONFIGS = [Counts()]  # noqa: RUF012  TFDS reads it from the class

    def corpus(self) -> Corpus:
        return biographies(self.builder_config.n_subjects, **self.builder_config.arguments())
