"""Fields of the System Reference Document read as short answers, and the wordings that state and
ask them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from kafjax.corpus.facts import Attribute

Record = dict[str, Any]  # a spell or a creature as the database has it
Answers = tuple[str, ...]
_ORDINALS = ("", "1st", "2nd", "3rd", "4th", "5th", "6th", "7th", "8th", "9th")
_CHALLENGES = {0.125: "1/8", 0.25: "1/4", 0.5: "1/2"}

SCHOOL = Attribute(
    name="school",
    statements=(
        "{name} belongs to the school of {value}.",
        "The school of magic of {name} is {value}.",
        "Wizards count {name} among the spells of {value}.",
        "{value} is the school that {name} belongs to.",
        "Of the schools of magic, {name} is taught in {value}.",
        "Those who study {value} learn {name}.",
        "In books of magic, {name} stands under {value}.",
        "{name} is magic of the school of {value}.",
    ),
    questions=(
        "Which school of magic does {name} belong to?",
        "What is the school of magic of {name}?",
        "To what school does {name} belong?",
        "Of what school of magic is {name}?",
    ),
    paraphrases=(
        "What kind of wizardry is {name}?",
        "Which branch of spellcraft covers {name}?",
        "What branch of magic is {name}?",
    ),
)

DURATION = Attribute(
    name="duration",
    statements=(
        "The duration of {name} is: {value}.",
        "{name} has this duration: {value}.",
        "How long {name} lasts is given as {value}.",
        "For {name}, the rules give a duration of: {value}.",
        "The time that {name} stays in effect is {value}.",
        "Once cast, {name} has a duration that reads {value}.",
        "As its duration, {name} has {value}.",
        "The effect of {name} is, in time, {value}.",
    ),
    questions=(
        "What is the duration of {name}?",
        "How long does {name} last?",
        "What duration does {name} have?",
        "For how long is {name} in effect?",
    ),
    paraphrases=(
        "How long does {name} go on?",
        "What time passes until {name} ends?",
        "After how much time is {name} over?",
    ),
)

LEVEL = Attribute(
    name="level",
    statements=(
        "{name} is a spell of the {value} level.",
        "The level of {name} is the {value}.",
        "Casters know {name} as {value} level magic.",
        "To cast {name}, a slot of the {value} level is needed.",
        "{name} takes a slot of the {value} level.",
        "Lists of spells have {name} at the {value} level.",
        "Among spells, {name} counts to the {value} level.",
        "It is at the {value} level that one finds {name}.",
    ),
    questions=(
        "Of which level is {name}?",
        "What level does {name} have?",
        "What is the level of {name}?",
        "At which level is {name}?",
    ),
    paraphrases=(
        "Which slot does a caster need for {name}?",
        "How high up in the lists does {name} stand?",
        "Which slot pays for {name}?",
    ),
)

CASTING_TIME = Attribute(
    name="casting_time",
    statements=(
        "The casting time of {name} is {value}.",
        "Casting {name} takes {value}.",
        "It takes {value} to cast {name}.",
        "{name} has a casting time of {value}.",
        "Whoever casts {name} spends {value} on it.",
        "For {name}, the rules ask {value} of the caster.",
        "{value} is what it takes to cast {name}.",
        "A caster needs {value} for {name}.",
    ),
    questions=(
        "What is the casting time of {name}?",
        "How long does it take to cast {name}?",
        "What casting time does {name} have?",
        "What does it take to cast {name}?",
    ),
    paraphrases=(
        "How much time must a caster spend on {name}?",
        "What does {name} demand of whoever casts it?",
        "How quickly can {name} be cast?",
    ),
)

HIT_POINTS = Attribute(
    name="hit_points",
    statements=(
        "{name} has {value} hit points.",
        "The hit points of {name} are {value}.",
        "On average, {name} has {value} hit points.",
        "It takes {value} points of damage to bring down {name}.",
        "{value} hit points are given for {name}.",
        "The rules give {name} {value} hit points.",
        "With {value} hit points, {name} goes into a fight.",
        "Damage of {value} points is what {name} can take.",
    ),
    questions=(
        "How many hit points does {name} have?",
        "What are the hit points of {name}?",
        "What number of hit points does {name} have?",
        "How many hit points are given for {name}?",
    ),
    paraphrases=(
        "How much harm does it take to defeat {name}?",
        "With how many hit points does {name} start a battle?",
        "How many points must {name} lose before it falls?",
    ),
)

ARMOR_CLASS = Attribute(
    name="armor_class",
    statements=(
        "{name} has an armor class of {value}.",
        "The armor class of {name} is {value}.",
        "An attack must reach {value} to hit {name}.",
        "{value} is the armor class of {name}.",
        "The rules give {name} an armor class of {value}.",
        "To hit {name}, one has to roll {value} in all.",
        "With an armor class of {value}, {name} defends itself.",
        "Attackers of {name} face an armor class of {value}.",
    ),
    questions=(
        "What is the armor class of {name}?",
        "Which armor class does {name} have?",
        "How high is the armor class of {name}?",
        "What armor class is given for {name}?",
    ),
    paraphrases=(
        "How good must a strike be to get through to {name}?",
        "What total of the dice gets past the guard of {name}?",
        "Which armor class do attackers of {name} face?",
    ),
)

CHALLENGE = Attribute(
    name="challenge",
    statements=(
        "{name} has a challenge rating of {value}.",
        "The challenge rating of {name} is {value}.",
        "As a challenge, {name} is rated {value}.",
        "{value} is the challenge rating of {name}.",
        "The rules rate {name} at a challenge of {value}.",
        "Lists of creatures have {name} at challenge {value}.",
        "A challenge of {value} is what {name} poses.",
        "Game masters find {name} under challenge rating {value}.",
    ),
    questions=(
        "What is the challenge rating of {name}?",
        "Which challenge rating does {name} have?",
        "How high is the challenge rating of {name}?",
        "What challenge rating is given for {name}?",
    ),
    paraphrases=(
        "How hard a challenge is {name}, by its rating?",
        "Under which rating do game masters find {name}?",
        "At what challenge is {name} rated?",
    ),
)

SPEED = Attribute(
    name="speed",
    statements=(
        "{name} walks {value} in a turn.",
        "The walking speed of {name} is {value}.",
        "On foot, {name} moves {value}.",
        "{name} has a walking speed of {value}.",
        "In one turn, {name} covers {value} on the ground.",
        "The rules let {name} walk {value}.",
        "{value} is how far {name} walks in a turn.",
        "On the ground, {name} gets {value} far in a turn.",
    ),
    questions=(
        "What is the walking speed of {name}?",
        "How far does {name} walk in a turn?",
        "What walking speed does {name} have?",
        "How fast does {name} walk?",
    ),
    paraphrases=(
        "How far does {name} get before the next one acts?",
        "How far does {name} get on foot?",
        "What distance does {name} manage on foot each round?",
    ),
)


def _duration(spell: Record) -> Answers:
    return (spell["duration"][0].lower() + spell["duration"][1:],)


def _level(spell: Record) -> Answers:
    level = int(spell["level"])
    return (_ORDINALS[level], str(level)) if level else ()  # cantrips have none


def _challenge(creature: Record) -> Answers:
    rating = float(creature["challenge_rating"])
    return (_CHALLENGES.get(rating, f"{rating:g}"),)


def _speed(creature: Record) -> Answers:
    found = re.fullmatch(r"(\d+) ft\.", creature["speed"]["walk"])
    return (
        () if found is None or found[1] == "0" else (f"{found[1]} feet", f"{found[1]} ft", found[1])
    )


# By table of the database: what one is called, and its attributes with what reads their answers
# from a record, () for none.
KINDS: dict[str, tuple[str, tuple[tuple[Attribute, Callable[[Record], Answers]], ...]]] = {
    "spells": (
        "spell",
        (
            (SCHOOL, lambda spell: (spell["school"]["name"].lower(),)),
            (DURATION, _duration),
            (LEVEL, _level),
            (CASTING_TIME, lambda spell: (spell["casting_time"],)),
        ),
    ),
    "monsters": (
        "creature",
        (
            (HIT_POINTS, lambda creature: (str(int(creature["hit_points"])),)),
            (ARMOR_CLASS, lambda creature: (str(int(creature["armor_class"][0]["value"])),)),
            (CHALLENGE, _challenge),
            (SPEED, _speed),
        ),
    ),
}
