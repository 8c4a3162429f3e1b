"""A corpus in a directory: documents and questions as FlashRAG or BEIR publish them, or files as
they are. docs/data.md has the formats.

    corpus.jsonl      {"id": "17", "contents": "Title\\nText ..."} a line; or files, each a document, ids are relative paths
    questions.jsonl   {"id": "q1", "question": "...", "golden_answers": ["...", ...]} a line; optionally
                      "passages": ids of gold documents, or of single passages of them ("17#0")
                      "split": see SPLITS (also accepted inside "metadata")
                      "subject": whom or what it is about (likewise)
    held_out.jsonl, replay.jsonl   optional prose for perplexity and for replay, as corpus.jsonl

Each may be .jsonl.gz, .csv, .tsv or .parquet, too. A question without a split takes part by its id:
sha256 puts half of them among the training questions (asked again as `seen`), the others are
`untrained`. Other files are only read where there is no corpus.jsonl.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import hashlib
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from kafjax.core.errors import UserError, nearest
from kafjax.core.records import SUPERVISED, Corpus, Document, Passage, Question
from kafjax.core.rundir import write_jsonl
from kafjax.core.text import shortened
from kafjax.core.words import has_more_words
from kafjax.corpus import beir, rows
from kafjax.corpus.chunking import PAGES, cut, deduplicate
from kafjax.corpus.files import read_documents, row_source, tell_of_others, utf8_name
from kafjax.corpus.markdown import MARKDOWN

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
# A first line of `contents` up to this long is a title.
TITLE_WORDS = 12
Gold = Mapping[str, tuple[Passage, ...]]
"""The passages that each id in a question's `passages` stands for."""
_WORD = re.compile(r"\w+")


def load_folder(
    path: str | Path,
    size: str | int | None = None,
    overlap: int = 0,
    *,
    needs_questions: bool = True,
) -> Corpus:
    """Reads a corpus from a directory; the module's docstring has the format.

    `size` and `overlap` are those of `chunk`, for every document. By default (None) a document of
    at most 100 words is one passage, as it is; a longer one is packed into passages of whole
    sentences, up to 64 words. A gold id that names a document stands for those of its passages that
    hold an accepted answer. With `needs_questions=False` a directory of documents alone will do.

    Raises `UserError` naming the file and line of what is missing, empty, broken, twice there or
    pointing nowhere.
    """
    root = Path(path)
    _check_directory(root)
    documents = _documents(root)
    passages, kept = deduplicate(cut(documents, size, overlap))
    questions = _questions(root, _gold_ids(documents, passages, kept), needed=needs_questions)
    by_split = defaultdict(list)
    for question in questions:
        by_split[question.split if question.split in NOT_ASKED else "asked"].append(question)
    return Corpus(
        name=corpus_name(root),
        documents=tuple(documents),
        passages=passages,
        training_questions=tuple(by_split["train"]),
        questions=tuple(by_split["asked"]),
        retention=tuple(by_split["retention"]),
        held_out_texts=_texts(root, "held_out"),
        replay_texts=_texts(root, "replay"),
        replay_questions=tuple(by_split["replay"]),
        supervised_questions=tuple(by_split[SUPERVISED]),
    )


def stream_folder(path: str | Path) -> tuple[Iterator[Document], list[Question]]:
    """Reads a corpus directory for training: its documents one at a time, as they are asked for,
    and its questions.

    Passages are not cut, so gold ids are left out. Ids of documents are not compared with each
    other: training uses none, and the ids of all would not fit into memory where their texts do
    not.

    Raises `UserError` as `load_folder` does, about documents when they are reached.
    """
    root = Path(path)
    _check_directory(root)
    return _stream_documents(root, None), load_questions(root)


def corpus_name(path: str | Path) -> str:
    """Names the corpus of a directory after it."""
    return utf8_name(Path(Path(path).resolve().name))


def load_passages(
    path: str | Path, size: str | int | None = None, overlap: int = 0
) -> tuple[Passage, ...]:
    """Reads only the passages of a corpus directory, which then needs no questions, or of one file
    in the format of `corpus.jsonl`.

    `size`, `overlap` and what is raised are as for `load_folder`.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.is_dir():
        documents = _documents(path)
    elif not path.name.endswith(rows.KINDS):
        raise UserError(
            f"{path}: documents come from a folder, or from a file that ends in {', '.join(rows.KINDS)}"
        )
    elif not (documents := list(_rows_as_documents(path.parent, path, {}))):
        raise UserError(f"{path} is empty")
    return deduplicate(cut(documents, size, overlap))[0]


def save_folder(corpus: Corpus, path: str | Path) -> None:
    """Writes a corpus so that `load_folder`, given the chunk size it was made with, returns an
    equal one (named after the directory).

    Each file appears whole or not at all. Raises `UserError` if the directory holds anything
    already.
    """
    root = Path(path)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(
            f"{root} exists and is not an empty directory; pick another one to save the corpus to"
        )
    write_jsonl(root / "corpus.jsonl", map(_document_row, corpus.documents))
    for name, texts in (("held_out", corpus.held_out_texts), ("replay", corpus.replay_texts)):
        if texts:
            write_jsonl(
                root / f"{name}.jsonl",
                ({"id": f"{name}-{k}", "contents": text} for k, text in enumerate(texts)),
            )
    # Last: a directory without its questions is refused by `load_folder`, so a torn write is
    # noticed.
    save_questions(
        root,
        (
            *corpus.training_questions,
            *corpus.questions,
            *corpus.retention,
            *corpus.replay_questions,
            *corpus.supervised_questions,
        ),
    )


def save_questions(directory: Path, questions: Iterable[Question]) -> None:
    """Writes `questions.jsonl`, whole or not at all."""
    write_jsonl(directory / "questions.jsonl", map(_question_row, questions))


def load_questions(directory: Path) -> list[Question]:
    """Reads `questions.jsonl` without the corpus, so gold passages are left out. Raises `UserError`
    as `load_folder` does."""
    return _questions(directory, None)


def _document_row(document: Document) -> dict[str, Any]:
    row = {"id": document.id, "title": document.title, "contents": document.text}
    return {**row, "format": document.format} if document.format else row


def _question_row(question: Question) -> dict[str, Any]:
    return {
        "id": question.id,
        "question": question.text,
        "golden_answers": list(question.answers),
        "passages": list(question.passages),
        "split": question.split,
        "subject": question.subject,
    }


def _check_directory(root: Path) -> None:
    if not root.is_dir():
        raise UserError(
            f"corpus directory {root} {'is no directory' if root.exists() else 'does not exist'}"
        )


def _documents(root: Path) -> list[Document]:
    return list(_stream_documents(root, {}))


def _stream_documents(root: Path, places: dict[str, str] | None) -> Iterator[Document]:
    """Yields the documents in order. `places` is filled with where each id stands; None: ids may
    repeat."""
    empty, file = True, rows.find(root, "corpus")
    if file is not None:
        tell_of_others(root, file)
    for document in (
        read_documents(root) if file is None else _rows_as_documents(root, file, places)
    ):
        empty = False
        yield document
    if empty:
        none = (
            "there is no corpus.jsonl, and no *.txt or *.md file with text"
            if file is None
            else f"{file.name} is empty"
        )
        raise UserError(f"the corpus in {root} is empty: {none}")


def _rows_as_documents(root: Path, file: Path, places: dict[str, str] | None) -> Iterator[Document]:
    of_beir = beir.is_beir(root)
    for row in rows.read(root, file, places, "_id" if of_beir else "id"):
        document = beir.document(row) if of_beir else _document(row)
        yield dataclasses.replace(document, source=row_source(file, row))


def _document(row: rows.Row) -> Document:
    values, place = row.values, row.place
    contents = rows.string(place, values, "contents")
    style = rows.string(place, values, "format", empty=True) if "format" in values else ""
    if style not in ("", MARKDOWN, PAGES):
        raise UserError(
            f"{place}: unknown format '{shortened(style, 40, str)}': '{MARKDOWN}', '{PAGES}' or none"
        )
    if "title" in values:
        return Document(
            values["id"], contents, rows.string(place, values, "title", empty=True), style
        )
    first, _, rest = contents.partition("\n")
    title = first.strip().strip('"')
    if (
        title
        and rest.strip()
        and not has_more_words(title, TITLE_WORDS)
        and title[-1] not in ".!?"
        and not style
    ):
        return Document(values["id"], f"{title}\n{rest}", title)
    return Document(values["id"], contents, format=style)


def _gold_ids(
    documents: Iterable[Document], passages: Iterable[Passage], kept: Mapping[str, str]
) -> Gold:
    """Maps each id in a question's `passages` to passages: a document to all of its own, a passage
    to the one kept in its place."""
    by_id = {passage.id: passage for passage in passages}
    of_document: dict[str, dict[str, Passage]] = {document.id: {} for document in documents}
    for passage, representative in kept.items():
        of_document[passage.rpartition("#")[0]][representative] = by_id[representative]
    return {passage: (by_id[representative],) for passage, representative in kept.items()} | {
        document: tuple(own.values()) for document, own in of_document.items()
    }


def holding(passages: Sequence[Passage], answers: Sequence[str]) -> list[Passage]:
    """Returns the passages that hold one of the answers, as whole words, whatever the case,
    punctuation and blanks."""
    # Scripts beyond ASCII may not separate words: there an answer is looked for anywhere.
    wanted = [
        plain if plain.isascii() else plain.strip()
        for answer in answers
        if (plain := _plain(answer)).strip()
    ]
    return [
        passage
        for passage in passages
        if any(answer in text for text in [_plain(passage.text)] for answer in wanted)
    ]


def _nearest_first(passages: Sequence[Passage], question: str) -> tuple[Passage, ...]:
    """Sorts the passages of a document by the question's words in them. A word counts the more, the
    fewer of the passages hold it: a short answer such as "2" stands in many."""
    asked = set(_WORD.findall(question.casefold()))
    held = [asked & set(_WORD.findall(passage.text.casefold())) for passage in passages]
    often = collections.Counter(word for words in held for word in words)
    weights = [sum(1 / often[word] for word in words) for words in held]
    order = sorted(range(len(passages)), key=lambda i: -weights[i])
    return tuple(passages[i] for i in order)


def _plain(text: str) -> str:
    return f" {' '.join(_WORD.findall(text.casefold()))} "


def _questions(root: Path, gold: Gold | None, *, needed: bool = True) -> list[Question]:
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
            passages=() if gold is None else _gold(place, values, answers, gold, without),
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


def _gold(
    place: str, row: dict[str, Any], answers: tuple[str, ...], gold: Gold, without: list[str]
) -> tuple[str, ...]:
    """Reads the ids of a question's gold passages: of a document those that hold an accepted
    answer, first the one with most of the question's words, since it alone is what an oracle reads.

    Where none does they are all of the document's, and the question's id goes to `without`.
    """
    found: dict[str, None] = {}
    for passage in rows.strings(place, row, "passages") if row.get("passages") is not None else ():
        if passage not in gold:
            close = difflib.get_close_matches(
                passage, itertools.islice(gold, 100_000), n=1, cutoff=0.0
            )
            raise UserError(
                f"{place}: gold passage '{passage}' of question '{row['id']}' matches nothing in the corpus "
                f"(nearest: '{close[0]}'; ids with '#' depend on the chunk size)"
            )
        own = gold[passage]
        if len(own) > 1:
            own = _nearest_first(own, row["question"])
        with_answer = holding(own, answers) if len(own) > 1 else list(own)
        if not with_answer:
            without.append(row["id"])
        found |= dict.fromkeys(one.id for one in with_answer or own)
    return tuple(found)


def _split(place: str, values: dict[str, Any]) -> str:
    if values.get("split") is None:
        return ""
    split = rows.string(place, values, "split")
    if split not in SPLITS:
        raise UserError(f"{place}: unknown split '{split}'. {nearest(split, SPLITS)}")
    return split


def _texts(root: Path, name: str) -> tuple[str, ...]:
    file = rows.find(root, name)
    return (
        ()
        if file is None
        else tuple(
            rows.string(row.place, row.values, "contents") for row in rows.read(root, file, {})
        )
    )
