"""The configuration of `scripts/passages.py`."""

from __future__ import annotations

import dataclasses

from kafjax.core.config import Config, nested, option
from kafjax.corpus import CorpusConfig


@dataclasses.dataclass(frozen=True)
class ListPassages(Config):
    """The passages of a corpus, listed."""

    corpus: CorpusConfig = nested(
        CorpusConfig(retention=0, held_out=0), without=("retention", "held_out")
    )
    json: bool = option(False, "A JSON object a line instead of a table.", record=False)
    seed: int = option(0, "Seed of a generated corpus.", least=0, most=2**31 - 1)
