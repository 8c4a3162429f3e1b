"""Wordings of the corpora that ship: a paraphrase is asked in words that no document uses."""

from __future__ import annotations

import re

import pytest

from kafjax.corpus import country_fields, people, srd_fields
from kafjax.corpus.facts import Attribute
from kafjax.prompts.shots import ALTERNATIVES

ATTRIBUTES = [
    *people.ATTRIBUTES,
    people.MENTOR,
    *(attribute for attribute, _ in country_fields.FIELDS),
    *(attribute for _, fields in srd_fields.KINDS.values() for attribute, _ in fields),
]
# Words that carry a sentence's form, not what it says.
FORM = frozenset(
    """a all an and any are as at be been by can could did do does for from had has have how if in into is it its many much not of on
    or over than that the their then there this to was were what when where which who whoever whom whose with would you""".split()
)


def parts(wording: str) -> list[list[str]]:
    """Words of a wording, in pieces between the name and the value."""
    return [re.findall(r"[a-z]+", part) for part in re.split(r"\{\w+\}", wording.lower())]


def stem(word: str) -> str:
    return re.sub(r"(ies|es|s|ed|ing|e)$", "", word)[:6]


def content(wording: str) -> set[str]:
    return {stem(word) for part in parts(wording) for word in part if word not in FORM}


def triples(wording: str) -> set[tuple[str, ...]]:
    return {
        tuple(part[i : i + 3])
        for part in parts(wording)
        for i in range(len(part) - 2)
        if set(part[i : i + 3]) - FORM
    }


@pytest.mark.parametrize("attribute", ATTRIBUTES, ids=lambda attribute: attribute.name)
def test_no_paraphrase_repeats_the_predicate_of_a_document(attribute: Attribute):
    """Else it is no paraphrase: the document's own words ask. The name of the attribute itself can
    hardly be avoided ("hit points")."""
    named = content(attribute.name.replace("_", " "))
    for paraphrase in attribute.paraphrases:
        for statement in attribute.statements[:-1]:  # the last one is in no document
            shared = content(paraphrase) & content(statement) - named
            assert len(shared) < 2, (paraphrase, statement)
            run = triples(paraphrase) & triples(statement)
            assert all(set(map(stem, words)) & named for words in run), (paraphrase, statement)


def test_no_worked_example_asks_for_what_a_corpus_asks():
    asked = {
        " ".join(" ".join(part) for part in parts(question) if part)
        for attribute in ATTRIBUTES
        for question in (*attribute.questions, *attribute.paraphrases)
    }
    kinds = {word for question in asked for word in content(question)} - {"nam", "call", "on"}
    for alternatives in ALTERNATIVES:
        for shot in alternatives:
            assert not content(shot.question) & kinds, shot.question
