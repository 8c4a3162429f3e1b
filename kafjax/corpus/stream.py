"""Knowledge that changes: facts that are added, edited and deleted, step by step.

    world ──draw()──► changes of step 1, 2, ...          each a function of the seed and the steps before
    start(world) ──apply(changes)──► state after step 1 ──► state after step 2 ...
    snapshot(world, changes, t, ...)                     the documents and questions after step t

A fact is known by its subject and attribute, and is told in documents of its own, so that a change
touches the documents of that fact and no other. Only subjects without training questions change:
what is measured is what documents teach.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence

from kafjax.core.errors import UserError
from kafjax.core.records import Corpus, Document, Question
from kafjax.corpus import facts
from kafjax.corpus.chunking import chunk
from kafjax.corpus.facts import Attribute, Subject, stream

Key = tuple[str, str]
"""A fact's subject and attribute, by id and name."""
Answers = tuple[str, ...]
"""Accepted spellings of a value, the stated one first."""
State = Mapping[Key, Answers]

NEW, EARLIER, OLD, DELETED = "new", "earlier", "old", "deleted"
"""Splits of the questions after a step: facts that it added or edited, that an earlier one did,
that were never changed, and that are deleted."""
OTHERS = 7
"""Other values of its kind that a deleted one is weighed against."""


@dataclasses.dataclass(frozen=True)
class Change:
    """One fact with its value before (None: it is added) and after (None: it is deleted)."""

    key: Key
    before: Answers | None
    after: Answers | None


Step = tuple[Change, ...]


@dataclasses.dataclass(frozen=True)
class World:
    """Everything that there is to know.

    Attributes:
      subjects: with the values that they begin with; the first `n_start` are known from the start,
        the others come in their order.
      revise: `revise(subject, attribute, past, random)` gives a new value for a fact that has had
        the values `past`, the present one last; None where there is none.
      values: all values of an attribute, by its name.
    """

    name: str
    attributes: tuple[Attribute, ...]
    subjects: tuple[Subject, ...]
    n_start: int
    revise: Callable[[Subject, Attribute, Sequence[Answers], random.Random], Answers | None]
    values: Mapping[str, Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question after a step. The answers of a deleted fact are its last value.

    Attributes:
      past: values that held before and no longer do.
      others: of a deleted fact, values of the same kind that it never had.
    """

    question: Question
    past: Answers = ()
    others: Answers = ()


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The world after a step.

    Attributes:
      corpus: all that holds now, with the training questions.
      update: the documents of the facts that the step added or edited, and no questions.
      asked: a question for each fact that holds or is deleted.
    """

    corpus: Corpus
    update: Corpus
    asked: tuple[Asked, ...]


def start(world: World) -> dict[Key, Answers]:
    """Returns the facts that are known before the first step."""
    return {
        (subject.id, name): value
        for subject in world.subjects[: world.n_start]
        for name, value in subject.facts.items()
    }


def apply(state: State, changes: Step) -> dict[Key, Answers]:
    """Returns the state after some changes.

    Raises:
      ValueError: a fact changes twice, or is not in the state that its change begins with.
    """
    if len({change.key for change in changes}) < len(changes):
        raise ValueError("a fact changes twice in one step")
    after = dict(state)
    for change in changes:
        if after.pop(change.key, None) != change.before:
            raise ValueError(f"{change.key} is not {change.before} before its change")
        if change.after is not None:
            after[change.key] = change.after
    return after


def draw(
    world: World, n_steps: int, *, added: int, edited: int, deleted: int, seed: int
) -> tuple[Step, ...]:
    """Draws the changes of each step: `added` subjects with all their facts, `edited` and `deleted`
    facts of those that were there.

    A step depends on the seed and the steps before it: more steps change none of them.

    Raises:
      UserError: there are too few subjects or facts left for a step.
    """
    steps: list[Step] = []
    state, past = start(world), {key: [value] for key, value in start(world).items()}
    subjects = {subject.id: subject for subject in world.subjects}
    attributes = {attribute.name: attribute for attribute in world.attributes}
    for number in range(1, n_steps + 1):
        rng = stream(seed, world.name, "step", number)
        first = world.n_start + (number - 1) * added
        newcomers = world.subjects[first : first + added]
        if len(newcomers) < added:
            raise UserError(
                f"step {number} finds {len(newcomers)} new subjects of {world.name}, not {added}; fewer --steps, --added or --subjects"
            )
        changes = [
            Change((subject.id, name), None, value)
            for subject in newcomers
            for name, value in subject.facts.items()
        ]
        free = sorted(key for key in state if not subjects[key[0]].asked_in_training)
        rng.shuffle(free)
        edits: list[Change] = []
        for key in free:
            revised = world.revise(subjects[key[0]], attributes[key[1]], past[key], rng)
            if len(edits) < edited and revised is not None:
                edits.append(Change(key, state[key], revised))
        taken = {change.key for change in edits}
        gone = [Change(key, state[key], None) for key in free if key not in taken][:deleted]
        for what, found, wanted in (("edit", edits, edited), ("delete", gone, deleted)):
            if len(found) < wanted:
                raise UserError(
                    f"step {number} finds {len(found)} facts to {what}, not {wanted}; more --subjects, or fewer --edited and --deleted"
                )
        step = (*changes, *edits, *gone)
        for change in step:
            if change.after is not None:
                past.setdefault(change.key, []).append(change.after)
        state = apply(state, step)
        steps.append(step)
    return tuple(steps)


def snapshot(
    world: World, steps: Sequence[Step], *, n_documents: int, questions_per_fact: int, seed: int
) -> Snapshot:
    """Writes down what holds after `steps`: documents, training questions, and what is asked."""
    past: dict[Key, list[Answers]] = {key: [value] for key, value in start(world).items()}
    changed: dict[Key, int] = {}
    state: dict[Key, Answers] = start(world)
    for number, step in enumerate(steps, 1):
        state = apply(state, step)
        for change in step:
            changed[change.key] = number
            if change.after is not None:
                past.setdefault(change.key, []).append(change.after)
    touched = {change.key for change in steps[-1]} if steps else set()
    documents = write(world, state, n_documents, seed)
    passages = chunk(documents, "document")
    gold: dict[str, list[str]] = {}
    for passage in passages:
        gold.setdefault(passage.document.rpartition("/")[0], []).append(passage.id)
    ever = _subjects(world, {key: values[-1] for key, values in past.items()})
    asking = facts.assemble(
        world.name,
        ever,
        world.attributes,
        (),
        questions_per_fact=questions_per_fact,
        seed=seed,
        size="document",
        overlap=0,
    )
    asked = []
    for question in asking.questions:
        subject, attribute, split = question.id.split("/")
        if split == "seen":  # its paraphrase asks for the same fact
            continue
        key = (subject, attribute)
        now = state.get(key)
        earlier = past[key] if now is None else past[key][:-1]
        renamed = dataclasses.replace(
            question,
            id=f"{subject}/{attribute}",
            split=_split(now, changed.get(key), len(steps)),
            passages=tuple(gold.get(f"{subject}/{attribute}", ())),
        )
        kept = set(now or ())
        asked.append(
            Asked(
                renamed,
                tuple(dict.fromkeys(v for value in earlier for v in value if v not in kept)),
                () if now is not None else _others(world, key, past[key], seed),
            )
        )
    corpus = dataclasses.replace(
        asking,
        documents=documents,
        passages=passages,
        questions=tuple(one.question for one in asked),
    )
    told = {key: value for key, value in state.items() if key in touched}
    update = Corpus(world.name, write(world, told, n_documents, seed), (), (), ())
    return Snapshot(corpus, update, tuple(asked))


def write(world: World, state: State, n_documents: int, seed: int) -> tuple[Document, ...]:
    """Writes `n_documents` documents a fact, each stating it in other words:
    `SUBJECT/ATTRIBUTE/NUMBER`."""
    return tuple(
        dataclasses.replace(
            document, id=f"{subject.id}/{attribute.name}/{document.id.rpartition('/')[2]}"
        )
        for subject in _subjects(world, state)
        for attribute in world.attributes
        for document in (
            facts.state([subject], [attribute], n_documents, seed)
            if attribute.name in subject.facts
            else ()
        )
    )


def _subjects(world: World, state: State) -> list[Subject]:
    """Returns the subjects that a state tells something about, with what it tells."""
    told = [
        dataclasses.replace(
            subject,
            facts={
                attribute.name: state[subject.id, attribute.name]
                for attribute in world.attributes
                if (subject.id, attribute.name) in state
            },
        )
        for subject in world.subjects
    ]
    return [subject for subject in told if subject.facts]


def _split(now: Answers | None, changed: int | None, n_steps: int) -> str:
    if now is None:
        return DELETED
    if changed is None:
        return OLD
    return NEW if changed == n_steps else EARLIER


def _others(world: World, key: Key, past: Sequence[Answers], seed: int) -> Answers:
    had = {spelling for value in past for spelling in value}
    pool = [value for value in dict.fromkeys(world.values[key[1]]) if value not in had]
    rng = stream(seed, *key, "others")
    return tuple(rng.sample(pool, min(OTHERS, len(pool))))
