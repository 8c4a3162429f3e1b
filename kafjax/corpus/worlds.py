"""The worlds that `stream` changes: invented people, and countries between two editions of the CIA
World Factbook."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from kafjax.core.errors import UserError, nearest
from kafjax.corpus.biographies import people
from kafjax.corpus.editions import FIELDS, HOW, newer, older
from kafjax.corpus.facts import TEST, Attribute, Subject, role, stream
from kafjax.corpus.people import ATTRIBUTES, POOLS
from kafjax.corpus.stream import Answers, World

BIOGRAPHIES, FACTBOOK = "biographies", "factbook"
WORLDS = (BIOGRAPHIES, FACTBOOK)


def open_world(
    name: str, n_start: int, n_later: int, n_attributes: int, seed: int, old: Path | None
) -> World:
    """Opens a world by name.

    Args:
      n_start: subjects that are known from the start; every second one has training questions.
      n_later: subjects that may come later. Later ones change nothing about those before.
      old: of the Factbook, the folder of its older edition.

    Raises:
      UserError: an unknown name, an edition that is missing, or more subjects or attributes than
        there are.
    """
    if name == BIOGRAPHIES:
        return biographies_world(n_start, n_later, n_attributes, seed)
    if name == FACTBOOK:
        return factbook_world(n_start, n_later, n_attributes, seed, old)
    raise UserError(f"--corpus={name[:60]} does not change. {nearest(name, WORLDS)}")


def biographies_world(n_start: int, n_later: int, n_attributes: int, seed: int) -> World:
    """Invented people. An edit draws a value that the person never had."""
    everyone = people(n_start + n_later, n_attributes, seed)

    def revise(
        subject: Subject, attribute: Attribute, past: Sequence[Answers], rng: random.Random
    ) -> Answers | None:
        had = {spelling for value in past for spelling in value}
        left = [value for value in POOLS[attribute.name] if value not in had]
        return (rng.choice(left),) if left else None

    attributes = ATTRIBUTES[:n_attributes]
    values = {attribute.name: POOLS[attribute.name] for attribute in attributes}
    return World(
        BIOGRAPHIES, attributes, _untrained_later(everyone, n_start), n_start, revise, values
    )


def factbook_world(
    n_start: int, n_later: int, n_attributes: int, seed: int, old: Path | None
) -> World:
    """Countries. Those known from the start begin with the values of the older edition, and an edit
    brings one of them to the newer; later ones come with the newer values.

    Countries have all of the first `n_attributes` in both editions, in an order drawn from `seed`.
    """
    if old is None:
        raise UserError(
            f"--corpus=factbook changes between two editions; give the older one, --old=DIR: {HOW}"
        )
    attributes = tuple(attribute for attribute, _ in FIELDS[:n_attributes])
    if len(attributes) < n_attributes:
        raise UserError(
            f"attributes of a changing country must be 1 to {len(FIELDS)}, got {n_attributes}"
        )
    before, after = older(old), newer()
    names = [attribute.name for attribute in attributes]
    codes = [
        code
        for code, country in after.items()
        if code in before
        and all(name in country.facts and name in before[code].facts for name in names)
    ]
    if len(codes) < n_start + n_later:
        raise UserError(
            f"{len(codes)} countries have all {n_attributes} attributes in both editions, not {n_start + n_later}; "
            "fewer --subjects, --added or --steps"
        )
    codes.sort(key=lambda code: stream(seed, after[code].name, "order").random())
    subjects = tuple(
        Subject(
            id=f"country-{code}",
            name=after[code].name,
            facts={
                name: (before if number < n_start else after)[code].facts[name] for name in names
            },
            role=role(number, n_start) if number < n_start else TEST,
        )
        for number, code in enumerate(codes[: n_start + n_later])
    )

    def revise(
        subject: Subject, attribute: Attribute, past: Sequence[Answers], rng: random.Random
    ) -> Answers | None:
        value = after[subject.id.removeprefix("country-")].facts[attribute.name]
        return None if set(value) & {one for earlier in past for one in earlier} else value

    values = {name: tuple(after[code].facts[name][0] for code in codes) for name in names}
    return World(FACTBOOK, attributes, subjects, n_start, revise, values)


def _untrained_later(everyone: Sequence[Subject], n_start: int) -> tuple[Subject, ...]:
    return tuple(
        Subject(
            person.id,
            person.name,
            person.facts,
            role(number, n_start) if number < n_start else TEST,
        )
        for number, person in enumerate(everyone)
    )
