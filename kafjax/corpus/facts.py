"""Facts about subjects, written down as documents and asked as questions: what generated corpora
have in common.

Subject x Attribute --state()--> documents --chunk()--> passages --assemble()--> training questions,
                    evaluation questions, each with its gold passages
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from kafjax.core.errors import UserError
from kafjax.core.records import SUPERVISED, Corpus, Document, Passage, Question
from kafjax.corpus.chunking import chunk

TRAINED, TEST, DEVELOPMENT, CONTROL = "trained", "untrained", "development", "control"
"""Roles of subjects. Of all but the controls there are documents; the trained ones have training
questions, too. The other roles name the split that asks about them."""


def role(index: int, n_subjects: int, n_development: int = 0) -> str:
    """Deals a role to the subject of a place: of `n_subjects` the even ones are trained and the odd
    ones tested, the next `n_development` are for choosing settings, those behind are controls."""
    if index < n_subjects:
        return TEST if index % 2 else TRAINED
    return DEVELOPMENT if index < n_subjects + n_development else CONTROL


def told(subjects: Iterable[Subject]) -> list[Subject]:
    """Returns the subjects that documents are written about."""
    return [subject for subject in subjects if subject.role != CONTROL]


@dataclasses.dataclass(frozen=True)
class Attribute:
    """A kind of fact about a subject, with the wordings that state it and ask for it.

    Wordings hold `{name}` and, where the value is told, `{value}` (or `{an}`, its indefinite
    article). The last of `statements` never appears in a corpus' documents: it is the unseen
    wording of `held_out_documents`. `questions` may be trained on; `paraphrases` are only used in
    evaluation. The first of `questions` also reads well with "the mentor of ..." as its name;
    `reverse` asks for the subject.
    """

    name: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    paraphrases: tuple[str, ...]
    reverse: str = ""


@dataclasses.dataclass(frozen=True)
class Subject:
    """The person or thing that facts are about. `facts` maps an attribute's name to its accepted
    answers, the stated one first. It may lack some. `role` says what it is there for."""

    id: str
    name: str
    facts: Mapping[str, tuple[str, ...]]
    role: str

    @property
    def asked_in_training(self) -> bool:
        return self.role == TRAINED


def stream(seed: int, *parts: object) -> random.Random:
    """A random stream of its own for (seed, parts), the same in every process and Python
    version."""
    digest = hashlib.sha256(":".join(map(str, (seed, *parts))).encode()).digest()
    return random.Random(int.from_bytes(digest, "big"))


def fill(wording: str, name: str, value: str = "") -> str:
    """Puts a name and a value into a wording; the sentence starts with a capital."""
    text = wording.format(
        name=name, value=value, an="an" if value[:1].lower() in ("a", "e", "i", "o", "u") else "a"
    )
    return text[0].upper() + text[1:]


def statements(subject: Subject, attribute: Attribute) -> list[str]:
    """The fact in every wording, the held-out one last."""
    return [
        fill(wording, subject.name, subject.facts[attribute.name][0])
        for wording in attribute.statements
    ]


def _told(subject: Subject, attributes: Sequence[Attribute]) -> list[Attribute]:
    return [attribute for attribute in attributes if attribute.name in subject.facts]


def state(
    subjects: Iterable[Subject], attributes: Sequence[Attribute], n_documents: int, seed: int
) -> tuple[Document, ...]:
    """Writes `n_documents` documents a subject: each states every attribute once, in its own order
    and wordings.

    A fact is worded anew in each document until the wordings are used up. Ids are `{subject.id}/0`,
    `/1` and so on.
    """
    return tuple(
        document
        for subject in subjects
        for document in _documents(subject, attributes, n_documents, seed)
    )


def _documents(
    subject: Subject, attributes: Sequence[Attribute], n_documents: int, seed: int
) -> Iterator[Document]:
    worded = {}
    for attribute in _told(subject, attributes):
        texts = statements(subject, attribute)[:-1]
        stream(seed, subject.name, attribute.name, "statements").shuffle(texts)
        worded[attribute.name] = texts
    for m in range(n_documents):
        order = list(worded)
        stream(seed, subject.name, "order", m).shuffle(order)
        text = " ".join(worded[name][m % len(worded[name])] for name in order)
        yield Document(id=f"{subject.id}/{m}", text=text, title=subject.name)


def held_out_documents(
    subjects: Iterable[Subject], attributes: Sequence[Attribute]
) -> tuple[Document, ...]:
    """One document a subject, in the wordings that no document of a corpus uses."""
    return tuple(
        Document(
            id=f"{subject.id}/held-out",
            text=" ".join(
                statements(subject, attribute)[-1] for attribute in _told(subject, attributes)
            ),
            title=subject.name,
        )
        for subject in subjects
    )


def gold(
    subjects: Iterable[Subject], attributes: Sequence[Attribute], passages: Iterable[Passage]
) -> dict[tuple[str, str], tuple[str, ...]]:
    """Ids of all passages that state a fact, by (subject id, attribute name). Looks only at
    passages from the subject's documents."""
    own = defaultdict(list)
    for passage in passages:
        own[passage.document.rpartition("/")[0]].append(passage)
    return {
        (subject.id, attribute.name): tuple(
            passage.id
            for passage in own[subject.id]
            if any(text in passage.text for text in statements(subject, attribute))
        )
        for subject in subjects
        for attribute in _told(subject, attributes)
    }


def assemble(
    name: str,
    subjects: Sequence[Subject],
    attributes: Sequence[Attribute],
    documents: Sequence[Document],
    *,
    questions_per_fact: int,
    seed: int,
    size: str | int,
    overlap: int,
    supervised: bool = False,
) -> Corpus:
    """Chunks the documents and asks every fact.

    A trained subject's fact is asked in `questions_per_fact` training wordings (split `train`);
    evaluated are the first of them again (`seen`) and an evaluation-only wording (`paraphrase`).
    Other subjects are asked in a training wording (`untrained`, `development` or `control`, by
    their role), so that only the subject is new. With `supervised` there are questions about test
    and development subjects to train on beside these, in wordings that are not asked.
    Raises `UserError` if a passage is too small to hold a fact, or `questions_per_fact` too large.
    """
    most = min(len(attribute.questions) for attribute in attributes)
    if not 1 <= questions_per_fact <= most:
        raise UserError(
            f"questions per fact must be 1 to {most} (the number of training wordings), got {questions_per_fact}"
        )
    passages = chunk(documents, size, overlap)
    evidence = gold(told(subjects), attributes, passages)
    if documents and not all(evidence.values()):
        longest = max(
            len(text.split())
            for s in told(subjects)
            for a in _told(s, attributes)
            for text in statements(s, a)
        )
        raise UserError(
            f"passages of {size} words cut facts in two; use at least {longest} words, or 'sentence'"
        )
    training: list[Question] = []
    same_facts: list[Question] = []
    splits = ("seen", "paraphrase", TEST, DEVELOPMENT, CONTROL)
    asked: dict[str, list[Question]] = {split: [] for split in splits}
    for subject in subjects:
        for attribute in _told(subject, attributes):
            rng = stream(seed, subject.name, attribute.name, "questions")
            wordings = rng.sample(attribute.questions, len(attribute.questions))
            paraphrase = rng.choice(attribute.paraphrases)
            passages_of_fact = evidence.get((subject.id, attribute.name), ())
            if subject.asked_in_training:
                for k, wording in enumerate(wordings[:questions_per_fact]):
                    training.append(
                        ask(subject, attribute, "train", wording, passages_of_fact, number=str(k))
                    )
                asked["seen"].append(ask(subject, attribute, "seen", wordings[0], passages_of_fact))
                asked["paraphrase"].append(
                    ask(subject, attribute, "paraphrase", paraphrase, passages_of_fact)
                )
                continue
            asked[subject.role].append(
                ask(subject, attribute, subject.role, wordings[0], passages_of_fact)
            )
            if supervised and subject.role != CONTROL:
                same_facts += [
                    ask(subject, attribute, SUPERVISED, wording, passages_of_fact, number=str(k))
                    for k, wording in enumerate(wordings[1:][:questions_per_fact])
                ]
    return Corpus(
        name=name,
        documents=tuple(documents),
        passages=passages,
        training_questions=tuple(training),
        questions=tuple(question for split in asked.values() for question in split),
        supervised_questions=tuple(same_facts),
    )


def ask(
    subject: Subject,
    attribute: Attribute,
    split: str,
    wording: str,
    passages: tuple[str, ...],
    *,
    number: str = "",
) -> Question:
    """Asks the subject's attribute in one wording."""
    return Question(
        id=f"{subject.id}/{attribute.name}/{split}{number}",
        text=fill(wording, subject.name),
        answers=subject.facts[attribute.name],
        split=split,
        passages=passages,
        subject=subject.name,
    )
