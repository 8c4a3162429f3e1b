"""Synthetic biographies: invented people with a few facts each, so that nothing can be known
beforehand.

Every person has a random stream of their own, from sha256(seed, name), and every choice a stream
within it: more people change nothing about those before, more attributes or documents no fact.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

from kafjax.core.errors import UserError
from kafjax.core.records import Corpus, Document, Passage, Question
from kafjax.corpus.facts import (
    TEST,
    Attribute,
    Subject,
    assemble,
    fill,
    gold,
    role,
    state,
    stream,
    told,
)
from kafjax.corpus.people import (
    ATTRIBUTES,
    FIRST_NAMES,
    MENTOR,
    POOLS,
    SURNAME_ENDS,
    SURNAME_STARTS,
)

# Half of all names there are: beyond, drawing a new one gets slow.
MAX_PEOPLE = len(FIRST_NAMES) * len(SURNAME_STARTS) * len(SURNAME_ENDS) // 2


def biographies(
    n_people: int = 24,
    n_attributes: int = 4,
    n_documents: int = 4,
    questions_per_fact: int = 2,
    seed: int = 0,
    size: str | int = "sentence",
    overlap: int = 0,
    *,
    reversed_questions: bool = False,
    two_hop: bool = False,
    updates: bool = False,
    n_development: int = 0,
    n_controls: int = 0,
    supervised: bool = False,
) -> Corpus:
    """Invented people, `n_documents` documents on each, every fact asked.

    Every second person (the even ones) has training questions: `questions_per_fact` wordings a
    fact. Evaluation asks one of these again (`seen`), the same fact in an evaluation-only wording
    (`paraphrase`), and the other people in training wordings (`untrained`): there only the person
    is new. A question's gold passages are all passages that state the fact.

    On request:
      reversed_questions: adds questions for the person by the value, where only one person has it
        (split `reversed`).
      two_hop: gives everyone but the first a mentor among the people before, and asks for the
        mentors' facts (split `two_hop`; gold are the passages stating the mentor's fact; which
        person the mentor is must be known as well).
      updates: corrects one fact of each person without training questions in further documents, and
        asks for the new value (split `update`, in place of the question for the old one).
      n_development, n_controls: adds people behind the others of whom only documents tell
        (`development`), or nothing (`control`).
      supervised: adds training questions about the people without, for methods that say so.

    Raises `UserError` for counts out of range, and for updates together with one of the others.
    """
    if updates and (reversed_questions or two_hop):
        raise UserError(
            "updates leave two answers to a fact: ask reversed and two-hop questions of a corpus without them"
        )
    subjects, attributes = _people(
        n_people, n_attributes, seed, n_development, n_controls, two_hop=two_hop
    )
    described = told(subjects)
    documents = state(described, attributes, _at_least_one("documents a person", n_documents), seed)
    changed = _changed(subjects, attributes[:n_attributes], seed) if updates else ()
    documents += tuple(
        document
        for person, attribute in changed
        for document in _corrections(person, attribute, n_documents, seed)
    )
    corpus = assemble(
        "biographies",
        subjects,
        attributes,
        documents,
        questions_per_fact=questions_per_fact,
        seed=seed,
        size=size,
        overlap=overlap,
        supervised=supervised,
    )
    questions = corpus.questions
    if changed:
        questions = _updated(questions, changed, corpus.passages)
    if reversed_questions:
        questions += _reversed(described, attributes[:n_attributes], corpus.passages)
    if two_hop:
        questions += _two_hop(described, attributes[:n_attributes], corpus.passages)
    return dataclasses.replace(corpus, questions=questions)


def control(
    n_people: int = 24,
    n_attributes: int = 4,
    n_documents: int = 4,
    questions_per_fact: int = 2,
    seed: int = 0,
    size: str | int = "sentence",
    overlap: int = 0,
) -> Corpus:
    """The empty control: the evaluation questions of `biographies`, but documents and training
    questions on other people.

    Nothing in it answers a question (so no question has gold passages): whatever a method scores
    here is guessing and format.
    """
    subjects, attributes = _people(2 * n_people, n_attributes, seed)
    asked: dict[str, Any] = {
        "questions_per_fact": questions_per_fact,
        "seed": seed,
        "size": size,
        "overlap": overlap,
    }
    documents = state(
        subjects[n_people:], attributes, _at_least_one("documents a person", n_documents), seed
    )
    others = assemble("biographies-control", subjects[n_people:], attributes, documents, **asked)
    return dataclasses.replace(
        others, questions=assemble("", subjects[:n_people], attributes, (), **asked).questions
    )


def people(n_people: int, n_attributes: int = 4, seed: int = 0) -> tuple[Subject, ...]:
    """The first `n_people` people of a seed; the even ones have training questions."""
    return _people(n_people, n_attributes, seed)[0]


def _people(
    n_people: int,
    n_attributes: int,
    seed: int,
    n_development: int = 0,
    n_controls: int = 0,
    *,
    two_hop: bool = False,
) -> tuple[tuple[Subject, ...], tuple[Attribute, ...]]:
    if not 2 <= n_people <= MAX_PEOPLE:
        raise UserError(
            f"people must be 2 (one with training questions, one without) to {MAX_PEOPLE}, got {n_people}"
        )
    if not 1 <= n_attributes <= len(ATTRIBUTES):
        raise UserError(f"attributes a person must be 1 to {len(ATTRIBUTES)}, got {n_attributes}")
    attributes = ATTRIBUTES[:n_attributes]
    names = _names(n_people + n_development + n_controls, seed)
    subjects = []
    for index, name in enumerate(names):
        facts = {
            a.name: (stream(seed, name, a.name, "value").choice(POOLS[a.name]),) for a in attributes
        }
        if two_hop and index:
            facts[MENTOR.name] = (names[stream(seed, name, MENTOR.name, "value").randrange(index)],)
        subjects.append(
            Subject(f"person-{index}", name, facts, role(index, n_people, n_development))
        )
    return tuple(subjects), (*attributes, MENTOR) if two_hop else attributes


def _names(n_people: int, seed: int) -> list[str]:
    """Unique names; a name that an earlier person has is drawn again, so that later people have no
    say."""
    names: dict[str, None] = {}
    for index in range(n_people):
        rng = stream(seed, index, "name")
        while (
            name
            := f"{rng.choice(FIRST_NAMES)} {rng.choice(SURNAME_STARTS)}{rng.choice(SURNAME_ENDS)}"
        ) in names:
            pass
        names[name] = None
    return list(names)


def _at_least_one(what: str, number: int) -> int:
    if number < 1:
        raise UserError(f"{what} must be at least 1, got {number}")
    return number


def _reversed(
    subjects: Sequence[Subject], attributes: Sequence[Attribute], passages: Sequence[Passage]
) -> tuple[Question, ...]:
    evidence = gold(subjects, attributes, passages)
    owners = Counter((a.name, s.facts[a.name][0]) for s in subjects for a in attributes)
    return tuple(
        Question(
            id=f"{subject.id}/{attribute.name}/reversed",
            text=fill(attribute.reverse, subject.name, value),
            answers=(subject.name,),
            split="reversed",
            passages=evidence[subject.id, attribute.name],
            subject=subject.name,
        )
        for subject in subjects
        for attribute in attributes
        if owners[attribute.name, (value := subject.facts[attribute.name][0])] == 1
    )


def _two_hop(
    subjects: Sequence[Subject], attributes: Sequence[Attribute], passages: Sequence[Passage]
) -> tuple[Question, ...]:
    evidence = gold(subjects, attributes, passages)
    by_name = {subject.name: subject for subject in subjects}
    return tuple(
        Question(
            id=f"{subject.id}/{MENTOR.name}/{attribute.name}/two_hop",
            text=fill(attribute.questions[0], f"the mentor of {subject.name}"),
            answers=mentor.facts[attribute.name],
            split="two_hop",
            passages=evidence[mentor.id, attribute.name],
            subject=subject.name,
        )
        for subject in subjects
        if MENTOR.name in subject.facts
        for mentor in [by_name[subject.facts[MENTOR.name][0]]]
        for attribute in attributes
    )


def _changed(
    subjects: Sequence[Subject], attributes: Sequence[Attribute], seed: int
) -> tuple[tuple[Subject, Attribute], ...]:
    """One attribute with a new value for every person without training questions."""
    changed = []
    for subject in subjects:
        if subject.role == TEST:
            rng = stream(seed, subject.name, "update")
            attribute = rng.choice(attributes)
            value = rng.choice(
                [
                    value
                    for value in POOLS[attribute.name]
                    if value not in subject.facts[attribute.name]
                ]
            )
            changed.append(
                (dataclasses.replace(subject, facts={attribute.name: (value,)}), attribute)
            )
    return tuple(changed)


def _corrections(
    person: Subject, attribute: Attribute, n_documents: int, seed: int
) -> tuple[Document, ...]:
    return tuple(
        dataclasses.replace(
            document, id=f"{person.id}/update-{m}", text=f"Correction: {document.text}"
        )
        for m, document in enumerate(state([person], [attribute], n_documents, seed))
    )


def _updated(
    questions: Sequence[Question],
    changed: Sequence[tuple[Subject, Attribute]],
    passages: Sequence[Passage],
) -> tuple[Question, ...]:
    new = {
        f"{person.id}/{attribute.name}/untrained": (person, attribute)
        for person, attribute in changed
    }

    def update(question: Question) -> Question:
        if question.id not in new:
            return question
        person, attribute = new[question.id]
        return dataclasses.replace(
            question,
            id=f"{person.id}/{attribute.name}/update",
            split="update",
            answers=person.facts[attribute.name],
            passages=gold([person], [attribute], passages)[person.id, attribute.name],
        )

    return tuple(map(update, questions))
