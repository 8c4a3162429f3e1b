"""The questions of a corpus directory: questions.jsonl, read and written, and the part that each
takes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from absl import logging

from kafjax.core.errors import UserError, nearest
from kafjax.core.records import SUPERVISED, Corpus, Question
from kafjax.core.rundir import write_jsonl
from kafjax.corpus import beir, rows
from kafjax.corpus.gold import Gold, gold_of

SPLITS = (
    "train",
    "seen",
    "paraphrase",
    "untrained",
    "development",
    "control",
    SUPERVISED,
    "retention",
    "replay",
    "reversed",
    "two_hop",
    "update",
)
NOT_ASKED = ("train", "retention", "replay", SUPERVISED)
"""Splits that are no part of the questions about the documents."""


def load_questions(directory: Path) -> list[Question]:
    """Reads `questions.jsonl` without the corpus, so gold passages are left out. Raises `UserError`
    as `load_folder` does."""
    return read_questions(directory, None)


def save_questions(directory: Path, questions: Iterable[Question]) -> None:
    """Writes `questions.jsonl`, whole or not at all."""
    write_jsonl(directory / "questions.jsonl", map(_question_row, questions))


def read_questions(root: Path, gold: Gold | None, *, needed: bool = True) -> list[Question]:
    """Reads the questions. `gold` says what each id in `passages` stands for; None leaves gold
    passages out.

    Tells of questions that name a document of which no passage holds an accepted answer. Raises
    `UserError` for a file that is missing or empty, if it is `needed`, and for whatever is wrong in
    it.
    """
    if beir.is_beir(root):
        if needed:
            why = "BEIR's queries have no answers to score or to train on"
            raise UserError(
                f"{root}: {why}; rank its documents with scripts/rank.py, or add questions.jsonl"
            )
        return beir.questions(root, gold) if (root / "qrels").is_dir() else []
    file = rows.find(root, "questions")
    if file is None:
        if not needed:
            return []
        others = [
            other.name
            for other in sorted(root.glob("*.jsonl"))
            if other.stem not in ("corpus", "held_out", "replay")
        ]
        instead = f"; rename {others[0]} if it holds them" if others else ""
        raise UserError(
            f'there is no questions.jsonl in {root}: one {{"id", "question", "golden_answers"}} a line{instead}'
        )
    questions: list[Question] = []
    without: list[str] = []
    for row in rows.read(root, file, {}):
        values, place = row.values, row.place
        optional = {**_from_metadata(values.get("metadata")), **values}
        answers = _answers(place, values)
        question = Question(
            id=values["id"],
            text=rows.string(place, values, "question"),
            answers=answers,
            split=_split(place, optional),
            passages=() if gold is None else gold_of(place, values, answers, gold, without),
            subject=", ".join(rows.strings(place, optional, "subject"))
            if optional.get("subject") is not None
            else "",
        )
        questions += [question] if question.split else deal(question)
    if not questions:
        raise UserError(f"{file} is empty")
    if without:
        named = f"{len(without)} questions name a document of which no passage holds an accepted answer, such as '{without[0]}'"
        logging.warning("%s: %s; all of its passages count as gold", file, named)
    return questions


def deal(question: Question) -> list[Question]:
    """Deals a question without a split: by a hash of its id, half are trained on and asked
    again."""

    def as_split(split: str, suffix: str = "") -> Question:
        return Question(
            f"{question.id}{suffix}",
            question.text,
            question.answers,
            split,
            question.passages,
            question.subject,
        )

    if hashlib.sha256(question.id.encode()).digest()[0] % 2:
        return [as_split("untrained")]
    return [as_split("train", "/train"), as_split("seen")]


def is_dealt(corpus: Corpus) -> bool:
    """True if the questions of a corpus take part as `deal` deals them: their file says nothing of
    splits."""
    as_dealt = [one for question in corpus.questions for one in deal(question)]
    asked = [question for question in as_dealt if question.split != "train"]
    trained = {question.id for question in as_dealt if question.split == "train"}
    return asked == list(corpus.questions) and trained == {
        question.id for question in corpus.training_questions
    }


def _question_row(question: Question) -> dict[str, Any]:
    return {
        "id": question.id,
        "question": question.text,
        "golden_answers": list(question.answers),
        "passages": list(question.passages),
        "split": question.split,
        "subject": question.subject,
    }


def _from_metadata(metadata: Any) -> dict[str, Any]:
    """Reads split and subject out of a row's metadata, where they mean the same. Others write there
    what they like."""
    if not isinstance(metadata, dict):
        return {}
    split, subject = metadata.get("split"), metadata.get("subject")
    found = {"split": split} if isinstance(split, str) and split in SPLITS else {}
    names = subject if isinstance(subject, list) else [subject]
    return found | (
        {"subject": subject}
        if all(isinstance(name, str | int) and not isinstance(name, bool) for name in names)
        else {}
    )


def _answers(place: str, values: dict[str, Any]) -> tuple[str, ...]:
    answers = rows.strings(place, values, "golden_answers")
    choices = values.get("choices")
    # a question of several choices: answers are their numbers, from 0
    if isinstance(choices, list) and choices:
        named = rows.strings(place, values, "choices")
        indices = [int(answer) for answer in answers if answer.isdecimal() and len(answer) < 9]
        if len(indices) < len(answers) or not all(index < len(named) for index in indices):
            raise UserError(
                f"{place}: 'golden_answers' must be numbers of 'choices', 0 to {len(named) - 1}"
            )
        answers = tuple(named[index] for index in indices)
    answers = tuple(answer for answer in answers if answer.strip())
    if not answers:
        raise UserError(
            f"{place}: question '{values['id']}' has no answers ('golden_answers' is empty)"
        )
    return answers


def _split(place: str, values: dict[str, Any]) -> str:
    if values.get("split") is None:
        return ""
    split = rows.string(place, values, "split")
    if split not in SPLITS:
        raise UserError(f"{place}: unknown split '{split}'. {nearest(split, SPLITS)}")
    return split
