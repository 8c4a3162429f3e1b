"""Regimes of training, by the suffix of a method's name: what `lora` trains on beside the documents
about everyone.

    lora               questions about other subjects: what the headline is about
    lora-documents     no questions at all
    lora-supervised    questions about other subjects, and about the very facts that are asked, in other words
    lora-single        as lora, but the first telling of each subject alone, as often as others read all of theirs
                       (sabotage: facts that are told in one wording are learned by heart, Allen-Zhu & Li 2023, arXiv:2309.14316)
"""

from __future__ import annotations

import dataclasses

from kafjax.core.errors import UserError
from kafjax.core.records import Corpus, Document
from kafjax.methods.settings import Settings

DOCUMENTS, SUPERVISED, SINGLE = "documents", "supervised", "single"
REGIMES = {
    "": "",
    DOCUMENTS: "trained on documents, no questions",
    SUPERVISED: "supervised: trained on questions for the facts that are asked, in other words",
    SINGLE: "trained on one telling of each subject, repeated",
}
"""Part of a method's note, by regime."""


def split(weights: str) -> tuple[str, str]:
    """Splits the name of weights into what trains and its regime: `lora-single` -> `("lora",
    "single")`."""
    kind, _, regime = weights.partition("-")
    return kind, regime


def in_regime(corpus: Corpus, settings: Settings, regime: str) -> tuple[Corpus, Settings]:
    """Returns what a regime trains on.

    Raises:
      UserError: the corpus has no questions to supervise with, or tells every subject once.
    """
    if regime == DOCUMENTS:
        return dataclasses.replace(corpus, training_questions=()), settings
    if regime == SUPERVISED:
        if not corpus.supervised_questions:
            raise UserError(
                f"{corpus.name} has no questions of split 'supervised', which -{SUPERVISED} trains on; choose another method"
            )
        questions = corpus.training_questions + corpus.supervised_questions
        return dataclasses.replace(corpus, training_questions=questions), settings
    if regime == SINGLE:
        first: dict[str, Document] = {}
        for document in corpus.documents:
            subject, _, number = document.id.rpartition("/")
            first.setdefault(subject if subject and number.isdigit() else document.id, document)
        if len(first) == len(corpus.documents):
            raise UserError(
                f"{corpus.name} tells every subject once, so -{SINGLE} would change nothing; choose another method"
            )
        once = dataclasses.replace(corpus, documents=tuple(first.values()))
        return once, dataclasses.replace(settings, document_parts=1)
    return corpus, settings
