"""TFDS builder of the System Reference Document's facts."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from kafjax.core.records import Corpus
from kafjax.corpus.builders.generated import Counts, Generated
from kafjax.corpus.srd import Source, read, srd


@dataclasses.dataclass(eq=False)
class SrdCounts(Counts):
    """`Counts` with `source`, the file of the database."""

    source: str = ""


class Srd(Generated):
    """Spells and creatures of the SRD 5.1 with facts that a small model does not know, told in
    documents and asked in questions."""

    BUILDER_CONFIGS = [SrdCounts()]  # noqa: RUF012  TFDS reads it from the class

    def corpus(self) -> Corpus:
        return srd(self._source, self.builder_config.n_subjects, **self.builder_config.arguments())

    def attribution(self) -> str:
        return self._source.attribution

    @functools.cached_property
    def _source(self) -> Source:
        return read(Path(self.builder_config.source))
