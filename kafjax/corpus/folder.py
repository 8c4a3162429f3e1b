"""A corpus in a directory: documents and questions as FlashRAG or BEIR publish them, or files as
they are. docs/data.md has the formats.

    corpus.jsonl      {"id": "17", "contents": "Title\\nText ..."} a line; or files, each a document, ids are relative paths
    questions.jsonl   {"id": "q1", "question": "...", "golden_answers": ["...", ...]} a line; optionally
                      "passages": ids of gold documents, or of single passages of them ("17#0")
                      "split": see `questions.SPLITS` (also accepted inside "metadata")
                      "subject": whom or what it is about (likewise)
    held_out.jsonl, replay.jsonl   optional prose for perplexity and for replay, as corpus.jsonl

Each may be .jsonl.gz, .csv, .tsv or .parquet, too. A question without a split takes part by its id:
sha256 puts half of them among the training questions (asked again as `seen`), the others are
`untrained`. Other files are only read where there is no corpus.jsonl.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kafjax.core.errors import UserError
from kafjax.core.records import SUPERVISED, Corpus, Document, Passage, Question
from kafjax.core.rundir import write_jsonl
from kafjax.core.text import shortened
from kafjax.core.words import has_more_words
from kafjax.corpus import beir, rows
from kafjax.corpus.chunking import PAGES, cut, deduplicate
from kafjax.corpus.files import read_documents, row_source, tell_of_others, utf8_name
from kafjax.corpus.gold import gold_ids
from kafjax.corpus.markdown import MARKDOWN
from kafjax.corpus.questions import NOT_ASKED, load_questions, read_questions, save_questions

# A first line of `contents` up to this long is a title.
TITLE_WORDS = 12


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
    questions = read_questions(root, gold_ids(documents, passages, kept), needed=needs_questions)
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


def _document_row(document: Document) -> dict[str, Any]:
    row = {"id": document.id, "title": document.title, "contents": document.text}
    return {**row, "format": document.format} if document.format else row


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


def _texts(root: Path, name: str) -> tuple[str, ...]:
    file = rows.find(root, name)
    return (
        ()
        if file is None
        else tuple(
            rows.string(row.place, row.values, "contents") for row in rows.read(root, file, {})
        )
    )
