"""Fields of the World Factbook read as short answers, and the wordings that state and ask them."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable
from typing import Any

from kafjax.corpus.facts import Attribute

# a country's entry: nested sections whose leaves hold {"text": ..., "note": ...}
Country = dict[str, Any]

HIGHEST_POINT = Attribute(
    name="highest_point",
    statements=(
        "The highest point in {name} is {value}.",
        "{value} is the highest point in {name}.",
        "No place in {name} lies higher than {value}.",
        "The land of {name} reaches its greatest height at {value}.",
        "Whoever climbs {value} stands on the top of {name}.",
        "In {name}, nothing rises above {value}.",
        "Maps of {name} mark {value} as the highest point.",
        "The summit of {name} is called {value}.",
    ),
    questions=(
        "What is the highest point in {name}?",
        "Which place in {name} is the highest?",
        "What is the highest elevation in {name} called?",
        "What is the name of the highest point in {name}?",
    ),
    paraphrases=(
        "Which peak overlooks all of {name}?",
        "Where would a climber in {name} be closest to the sky?",
        "Where would you stand to be as high up as possible in {name}?",
    ),
)

AIRPORTS = Attribute(
    name="airports",
    statements=(
        "{name} has {value} airports.",
        "There are {value} airports in {name}.",
        "The number of airports in {name} is {value}.",
        "Planes can land at {value} airports in {name}.",
        "A count of the airports in {name} gives {value}.",
        "In all, {name} counts {value} airports.",
        "Pilots find {value} airports in {name}.",
        "Airports in {name} number {value}.",
    ),
    questions=(
        "How many airports does {name} have?",
        "How many airports are there in {name}?",
        "What is the number of airports in {name}?",
        "How many airports can be found in {name}?",
    ),
    paraphrases=(
        "How many places to take off by plane does {name} offer?",
        "Among how many airfields can a pilot choose in {name}?",
        "If you visited every airport in {name}, how many would you see?",
    ),
)

MEDIAN_AGE = Attribute(
    name="median_age",
    statements=(
        "The median age in {name} is {value}.",
        "Half of the people in {name} are younger than {value}.",
        "{value} is the median age of the people of {name}.",
        "The population of {name} has a median age of {value}.",
        "In {name}, the median age stands at {value}.",
        "People in {name} have a median age of {value}.",
        "For {name}, statistics give a median age of {value}.",
        "Half of the inhabitants of {name} are older than {value}.",
    ),
    questions=(
        "What is the median age in {name}?",
        "What is the median age of the people of {name}?",
        "How high is the median age in {name}?",
        "What median age does {name} have?",
    ),
    paraphrases=(
        "What age do as many inhabitants of {name} exceed as fall short of?",
        "Every second person in {name} is younger than what age?",
        "Which age divides the residents of {name} into two groups of one size?",
    ),
)

MEAN_ELEVATION = Attribute(
    name="mean_elevation",
    statements=(
        "The mean elevation of {name} is {value}.",
        "On average, {name} lies {value} above sea level.",
        "{name} has a mean elevation of {value}.",
        "The land of {name} is {value} above the sea on average.",
        "Averaged over its area, {name} lies at {value}.",
        "The average height of the land in {name} is {value}.",
        "For {name}, maps give a mean elevation of {value}.",
        "The mean altitude of {name} comes to {value}.",
    ),
    questions=(
        "What is the mean elevation of {name}?",
        "What mean elevation does {name} have?",
        "How high is the mean elevation of {name}?",
        "What is the average elevation of {name}?",
    ),
    paraphrases=(
        "How high up is {name}, taken as a whole?",
        "What altitude is typical of {name}?",
        "How many meters up is a spot in {name}, if all are evened out?",
    ),
)

NATIONAL_ANTHEM = Attribute(
    name="national_anthem",
    statements=(
        'The national anthem of {name} is "{value}".',
        '{name} has "{value}" as its national anthem.',
        'The anthem sung in {name} is "{value}".',
        '"{value}" is the national anthem of {name}.',
        'On state occasions, {name} plays "{value}" as its anthem.',
        'The title of the anthem of {name} is "{value}".',
        'In {name}, people rise when "{value}" is played.',
        'As its anthem, {name} chose "{value}".',
    ),
    questions=(
        "What is the national anthem of {name}?",
        "Which national anthem does {name} have?",
        "What is the anthem of {name} called?",
        "What is the title of the national anthem of {name}?",
    ),
    paraphrases=(
        "Which song honors {name} at ceremonies?",
        "Which tune gets a crowd in {name} on its feet?",
        "Which song stands for {name} at the Olympic Games?",
    ),
)

COASTLINE = Attribute(
    name="coastline",
    statements=(
        "The coastline of {name} is {value} long.",
        "{name} has {value} of coastline.",
        "The coast of {name} stretches for {value}.",
        "{name} meets the sea along {value} of coast.",
        "The length of the coastline of {name} is {value}.",
        "A walk along the whole coast of {name} covers {value}.",
        "Measured in full, the shore of {name} runs for {value}.",
        "Along the sea, {name} extends for {value}.",
    ),
    questions=(
        "How long is the coastline of {name}?",
        "What is the length of the coastline of {name}?",
        "How much coastline does {name} have?",
        "How long is the coast of {name}?",
    ),
    paraphrases=(
        "How much shore does {name} have in all?",
        "For what distance does {name} border on salt water?",
        "How many kilometers of seashore are there in {name}?",
    ),
)


def text(country: Country, *path: str) -> str:
    """A field as plain text, "" where there is none: no markup, whitespace normalised."""
    node: Any = country
    for key in (*path, "text"):
        if not isinstance(node, dict) or key not in node:
            return ""
        node = node[key]
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", node)).split())


def name(country: Country) -> str:
    """The conventional short name, or the long one where the short is none; with its article ("the
    Netherlands"). "" if neither will do."""
    short, long = (
        text(country, "Government", "Country name", f"conventional {form} form")
        for form in ("short", "long")
    )
    found = long if short in ("", "none", "DRC", "The Dominican") else short
    if re.search(r"[(,;]", found):
        return ""
    article = r"^(United|Central African|Democratic Republic|Federated|Marshall|Solomon|Dominican)\b|^(Netherlands|Philippines|Maldives|Comoros)$"
    return re.sub("^The ", "the ", found) if not re.search(article, found) else f"the {found}"


def capital(country: Country) -> tuple[str, ...]:
    """Accepted spellings of the capital; () where the Factbook names several, adds a note, or the
    capital echoes the country's name."""
    field = text(country, "Government", "Capital", "name")
    noted = "note" in country.get("Government", {}).get("Capital", {})
    if not field or noted or ";" in field or re.search(r"\b(capital|aka|no)\b", field):
        return ()
    main, _, brackets = field.partition(" (")
    # Brackets hold other spellings ("Tirana (Tirane)") or a remark, which starts in lower case
    # ("Suva (on Viti Levu)").
    others = (
        re.split(r", |/", re.sub(r" is the .*", "", brackets.rstrip(")")))
        if brackets[:1].isupper()
        else []
    )
    spellings = [main, main.split(",")[0], *others]
    stem = name(country).removeprefix("the ").lower()
    if any(stem in spelling.lower() or spelling.lower() in stem for spelling in spellings):
        return ()
    return _unique(*spellings, *map(without_accents, spellings))


CONTINENTS = ("Africa", "Asia", "Europe", "North America", "South America", "Oceania")
# Plurals and old forms as the Factbook has them, by the word for one of them.
_CURRENCIES = {"zlotych": "zloty", "kronor": "krona", "kroner": "krone", "leva": "lev"}


def continent(country: Country) -> tuple[str, ...]:
    """The continent; () where the Factbook's maps show a country on two of them, or in a region."""
    found = text(country, "Geography", "Map references")
    return (found,) if found in CONTINENTS else ()


def currency(country: Country) -> tuple[str, ...]:
    """The currency without its country ("rupee"), and its plural."""
    match = re.match(
        r"([A-Za-z ]+?) ?\([A-Z]{3}\) per US dollar",
        text(country, "Economy", "Exchange rates", "Currency"),
    )
    if not match:
        return ()
    word = match[1].split()[-1].lower()
    return _unique(_CURRENCIES.get(word, word.removesuffix("s")), word)


def gdp(country: Country) -> float:
    """GDP at official exchange rates in US dollars, 0 where unknown."""
    match = re.match(
        r"\$([\d.,]+) (million|billion|trillion)",
        text(country, "Economy", "GDP (official exchange rate)"),
    )
    return (
        float(match[1].replace(",", ""))
        * {"million": 1e6, "billion": 1e9, "trillion": 1e12}[match[2]]
        if match
        else 0.0
    )


def without_accents(spelling: str) -> str:
    return "".join(
        c for c in unicodedata.normalize("NFKD", spelling) if not unicodedata.combining(c)
    )


def highest_point(country: Country) -> tuple[str, ...]:
    """A named place: no "unnamed elevation", no description of where it is."""
    match = re.fullmatch(
        r"([^\d(;,]+?)(?: \(([^)]*)\))? [\d,]+(?: m)?",
        text(country, "Geography", "Elevation", "highest point"),
    )
    if not match or match[1].startswith("unnamed") or " on " in match[1]:
        return ()
    other = [match[2]] if match[2] and re.fullmatch(r"[A-Z][\w' -]+", match[2]) else []
    spellings = [*match[1].split("/"), *other]
    return _unique(*spellings, *map(without_accents, spellings))


def airports(country: Country) -> tuple[str, ...]:
    return _number(text(country, "Transportation", "Airports"), r"\(\d+\)")


def median_age(country: Country) -> tuple[str, ...]:
    return _number(
        text(country, "People and Society", "Median age", "total"), r"years\b.*", "years"
    )


def mean_elevation(country: Country) -> tuple[str, ...]:
    return _number(text(country, "Geography", "Elevation", "mean elevation"), "m", "meters", "m")


def coastline(country: Country) -> tuple[str, ...]:
    return _number(text(country, "Geography", "Coastline"), r"km\b.*", "km", "kilometers")


def national_anthem(country: Country) -> tuple[str, ...]:
    """The title in the country's own language; not the one that a dozen realms share."""
    match = re.match(
        '["\u201c]([^"\u201c\u201d]+)["\u201d]',
        text(country, "Government", "National anthem(s)", "title"),
    )
    if not match or match[1] == "God Save the King" or len(match[1].split()) > 6:
        return ()
    return _unique(match[1], without_accents(match[1]))


def _number(field: str, rest: str, *units: str) -> tuple[str, ...]:
    """A number with its unit, with or without commas and unit; nothing below 10, which is guessed
    too easily."""
    match = re.fullmatch(rf"([\d,]+(?:\.\d+)?) {rest}", field)
    if not match or float(match[1].replace(",", "")) < 10:
        return ()
    plain = match[1].replace(",", "")
    return _unique(
        *(f"{number} {unit}" for number in (match[1], plain) for unit in units), match[1], plain
    )


def _unique(*spellings: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(spellings))


# In the order in which a corpus takes them, each with the function that reads its accepted answers,
# () where there are none.
FIELDS: tuple[tuple[Attribute, Callable[[Country], tuple[str, ...]]], ...] = (
    (HIGHEST_POINT, highest_point),
    (AIRPORTS, airports),
    (MEDIAN_AGE, median_age),
    (MEAN_ELEVATION, mean_elevation),
    (NATIONAL_ANTHEM, national_anthem),
    (COASTLINE, coastline),
)
