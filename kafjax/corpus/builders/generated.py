"""The shared part of the builders of generated corpora."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from kafjax.core.records import Corpus
from kafjax.corpus.tfds_rows import LISTS, TEXTS, corpus_rows


@dataclasses.dataclass(eq=False)
class Counts(tfds.core.BuilderConfig):
    """Size of a generated corpus, with the arguments of `corpus.biographies`. The configuration's
    name spells out all of them."""

    name: str = ""
    n_subjects: int = 24
    n_attributes: int = 4
    n_documents: int = 4
    questions_per_fact: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        self.name = f"{self.n_subjects}x{self.n_attributes}_documents{self.n_documents}_questions{self.questions_per_fact}_seed{self.seed}"

    def arguments(self) -> dict[str, int]:
        names = ("n_attributes", "n_documents", "questions_per_fact", "seed")
        return {name: getattr(self, name) for name in names}


class Generated(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes a corpus that needs no download, one TFDS split for each of its fields that has
    something."""

    VERSION = tfds.core.Version("1.0.0")

    @abc.abstractmethod
    def corpus(self) -> Corpus: ...

    def attribution(self) -> str | None:
        """The attribution that the licence of the text requires."""
        return None

    def _info(self) -> tfds.core.DatasetInfo:
        features = {name: tfds.features.Text() for name in TEXTS} | {
            name: tfds.features.Sequence(tfds.features.Text()) for name in LISTS
        }
        features = tfds.features.FeaturesDict(features)
        # Not shuffled: what is read is the corpus that was generated, in its order.
        about = {"description": type(self).__doc__, "license": self.attribution()}
        return tfds.core.DatasetInfo(
            builder=self, **about, features=features, disable_shuffling=True
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {split: enumerate(rows) for split, rows in corpus_rows(self.corpus()).items()}

    def _generate_examples(self) -> None:
        raise NotImplementedError("the splits bring their examples along")
