"""A corpus in a directory, in FlashRAG's format, read and written.

    corpus.jsonl      {"id": "17", "contents": "Title\\nText ..."} a line; or *.txt and *.md files, each a document, ids are relative paths
    questions.jsonl   {"id": "q1", "question": "...", "golden_answers": ["...", ...]} a line; optionally
                      "passages": ids of gold documents, or of single passages of them ("17#0")
                      "split": see SPLITS (also accepted inside "metadata")
                      "subject": whom or what it is about (likewise)
    held_out.jsonl, replay.jsonl   optional prose for perplexity and for replay, as corpus.jsonl

A question without a split takes part by its id: sha256 puts half of them among the training questions (asked again as `seen`), the others
are `untrained`. Text files are only read where there is no corpus.jsonl. Hidden files, and links that lead outside, are not read.
"""

from __future__ import annotations

import codecs
import difflib
import hashlib
import itertools
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from kafjax.core.errors import UserError, nearest
from kafjax.core.records import Corpus, Document, Passage, Question
from kafjax.core.rundir import write_jsonl
from kafjax.corpus.chunking import cut, deduplicate, words

SPLITS = ("train", "seen", "paraphrase", "untrained", "retention", "replay", "reversed", "two_hop", "update")
# Without a chunk size, documents up to this many words are passages as they are, and longer ones are packed into passages of CHUNK_WORDS.
SHORT_WORDS = 100
CHUNK_WORDS = 64
# A first line of `contents` up to this long is a title.
TITLE_WORDS = 12
Gold = Mapping[str, tuple[Passage, ...]]
"""The passages that each id in a question's `passages` stands for."""
_WORD = re.compile(r"\w+")


def load_folder(path: str | Path, size: str | int | None = None, overlap: int = 0, *, needs_questions: bool = True) -> Corpus:
    """Reads a corpus from a directory; the module's docstring has the format.

    `size` and `overlap` are those of `chunk`, for every document. By default (None) a document of at most 100 words is one passage, as it
    is; a longer one is packed into passages of whole sentences, up to 64 words. A gold id that names a document stands for those of
    its passages that hold an accepted answer. With `needs_questions=False` a directory of documents alone will do.

    Raises `UserError` naming the file and line of what is missing, empty, broken, twice there or pointing nowhere.
    """
    root = Path(path)
    _check_directory(root)
    documents = _documents(root)
    passages, kept = deduplicate(default_passages(documents, size, overlap))
    questions = _questions(root, _gold_ids(documents, passages, kept), needed=needs_questions)
    by_split = defaultdict(list)
    for question in questions:
        by_split[question.split if question.split in ("train", "retention", "replay") else "asked"].append(question)
    return Corpus(
        name=corpus_name(root),
        documents=tuple(documents),
        passages=passages,
        training_questions=tuple(by_split["train"]),
        questions=tuple(by_split["asked"]),
        retention=tuple(by_split["retention"]),
        held_out_texts=_texts(root, "held_out.jsonl"),
        replay_texts=_texts(root, "replay.jsonl"),
        replay_questions=tuple(by_split["replay"]),
    )


def stream_folder(path: str | Path) -> tuple[Iterator[Document], list[Question]]:
    """Reads a corpus directory for training: its documents one at a time, as they are asked for, and its questions.

    Passages are not cut, so gold ids are left out. Ids of documents are not compared with each other: training uses none, and the
    ids of all would not fit into memory where their texts do not.

    Raises `UserError` as `load_folder` does, about documents when they are reached.
    """
    root = Path(path)
    _check_directory(root)
    return _stream_documents(root, None), load_questions(root)


def corpus_name(path: str | Path) -> str:
    """Names the corpus of a directory after it."""
    return _utf8_name(Path(Path(path).resolve().name))


def load_passages(path: str | Path, size: str | int | None = None, overlap: int = 0) -> tuple[Passage, ...]:
    """Reads only the passages of a corpus directory, which then needs no questions, or of one file in the format of `corpus.jsonl`.

    `size`, `overlap` and what is raised are as for `load_folder`.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.is_dir():
        documents = _documents(path)
    elif not (documents := [_document(place, row) for place, row in _rows(path.parent, path.name)]):
        raise UserError(f"{path} is empty")
    return deduplicate(default_passages(documents, size, overlap))[0]


def save_folder(corpus: Corpus, path: str | Path) -> None:
    """Writes a corpus so that `load_folder`, given the chunk size it was made with, returns an equal one (named after the directory).

    Each file appears whole or not at all. Raises `UserError` if the directory holds anything already.
    """
    root = Path(path)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{root} exists and is not an empty directory; pick another one to save the corpus to")
    write_jsonl(root / "corpus.jsonl", ({"id": d.id, "title": d.title, "contents": d.text} for d in corpus.documents))
    for name, texts in (("held_out", corpus.held_out_texts), ("replay", corpus.replay_texts)):
        if texts:
            write_jsonl(root / f"{name}.jsonl", ({"id": f"{name}-{k}", "contents": text} for k, text in enumerate(texts)))
    # Last: a directory without its questions is refused by `load_folder`, so a torn write is noticed.
    save_questions(root, (*corpus.training_questions, *corpus.questions, *corpus.retention, *corpus.replay_questions))


def save_questions(directory: Path, questions: Iterable[Question]) -> None:
    """Writes `questions.jsonl`, whole or not at all."""
    write_jsonl(directory / "questions.jsonl", map(_question_row, questions))


def load_questions(directory: Path) -> list[Question]:
    """Reads `questions.jsonl` without the corpus, so gold passages are left out. Raises `UserError` as `load_folder` does."""
    return _questions(directory, None)


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
        raise UserError(f"corpus directory {root} {'is no directory' if root.exists() else 'does not exist'}")


def _documents(root: Path) -> list[Document]:
    return list(_stream_documents(root, {}))


def _stream_documents(root: Path, places: dict[str, str] | None) -> Iterator[Document]:
    """Yields the documents in order. `places` is filled with where each id stands; None: ids may repeat."""
    empty = True
    if (root / "corpus.jsonl").exists():
        source = "corpus.jsonl is empty"
        for place, row in _stream_rows(root, "corpus.jsonl", places):
            empty = False
            yield _document(place, row)
    else:
        source = "there is no corpus.jsonl, and no *.txt or *.md file with text"
        for name, text in _text_files(root):
            if text.strip():
                empty = False
                yield Document(id=name, text=text)
    if empty:
        raise UserError(f"the corpus in {root} is empty: {source}")


def _document(place: str, row: dict[str, Any]) -> Document:
    contents = _string(place, row, "contents")
    if "title" in row:
        return Document(id=row["id"], text=contents, title=_string(place, row, "title", empty=True))
    first, _, rest = contents.partition("\n")
    title = first.strip().strip('"')
    if title and rest.strip() and len(title.split()) <= TITLE_WORDS and title[-1] not in ".!?":
        return Document(id=row["id"], text=f"{title}\n{rest}", title=title)
    return Document(id=row["id"], text=contents)


def _text_files(root: Path) -> Iterator[tuple[str, str]]:
    """(relative path, text) of the text files, sorted by path."""
    inside = root.resolve()
    for file in sorted(root.rglob("*")):
        name = file.relative_to(root)
        if file.suffix.lower() not in (".txt", ".md") or not file.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        if not file.resolve().is_relative_to(inside):
            logging.warning("%s is a link that leads outside %s: not read", file, root)
            continue
        yield _utf8_name(name), _read(file)


def _utf8_name(path: Path) -> str:
    """Spells a path as text; bytes of it that are no UTF-8 become escapes."""
    return os.fsencode(path.as_posix()).decode(errors="backslashreplace")


def default_passages(documents: Sequence[Document], size: str | int | None, overlap: int) -> list[Passage]:
    """`cut`, but without a size short documents stay whole and longer ones are cut into some 64 words."""
    if size is not None:
        return cut(documents, size, overlap)
    if overlap:
        raise UserError(f"an overlap of {overlap} words needs a chunk size in words")
    return [
        passage
        for document in documents
        for passage in cut([document], "document" if len(words(document.text)) <= SHORT_WORDS else CHUNK_WORDS)
    ]


def _gold_ids(documents: Iterable[Document], passages: Iterable[Passage], kept: Mapping[str, str]) -> Gold:
    """Maps each id in a question's `passages` to passages: a document to all of its own, a passage to the one kept in its place."""
    by_id = {passage.id: passage for passage in passages}
    of_document: dict[str, dict[str, Passage]] = {document.id: {} for document in documents}
    for passage, representative in kept.items():
        of_document[passage.rpartition("#")[0]][representative] = by_id[representative]
    return {passage: (by_id[representative],) for passage, representative in kept.items()} | {
        document: tuple(own.values()) for document, own in of_document.items()
    }


def holding(passages: Sequence[Passage], answers: Sequence[str]) -> list[Passage]:
    """Returns the passages that hold one of the answers, as whole words, whatever the case, punctuation and blanks."""
    # Scripts beyond ASCII may not separate words: there an answer is looked for anywhere.
    wanted = [plain if plain.isascii() else plain.strip() for answer in answers if (plain := _plain(answer)).strip()]
    return [passage for passage in passages if any(answer in text for text in [_plain(passage.text)] for answer in wanted)]


def _plain(text: str) -> str:
    return f" {' '.join(_WORD.findall(text.casefold()))} "


def _questions(root: Path, gold: Gold | None, *, needed: bool = True) -> list[Question]:
    """Reads the questions. `gold` says what each id in `passages` stands for; None leaves gold passages out.

    Tells of questions that name a document of which no passage holds an accepted answer. Raises `UserError` for a file that is
    missing or empty, if it is `needed`, and for whatever is wrong in it.
    """
    if not (root / "questions.jsonl").exists():
        if not needed:
            return []
        raise UserError(f'there is no questions.jsonl in {root}: one {{"id", "question", "golden_answers"}} a line')
    questions: list[Question] = []
    without: list[str] = []
    for place, row in _rows(root, "questions.jsonl"):
        optional = {**_from_metadata(row.get("metadata")), **row}
        answers = _answers(place, row)
        question = Question(
            id=row["id"],
            text=_string(place, row, "question"),
            answers=answers,
            split=_split(place, optional),
            passages=() if gold is None else _gold(place, row, answers, gold, without),
            subject=_string(place, optional, "subject", empty=True) if "subject" in optional else "",
        )
        questions += [question] if question.split else deal(question)
    if not questions:
        raise UserError(f"{root / 'questions.jsonl'} is empty")
    if without:
        named = f"{len(without)} questions name a document of which no passage holds an accepted answer, such as '{without[0]}'"
        logging.warning("%s: %s; all of its passages count as gold", root / "questions.jsonl", named)
    return questions


def _from_metadata(metadata: Any) -> dict[str, str]:
    """Reads split and subject out of a row's metadata, where they mean the same. Others write there what they like."""
    if not isinstance(metadata, dict):
        return {}
    split, subject = metadata.get("split"), metadata.get("subject")
    found = {"split": split} if isinstance(split, str) and split in SPLITS else {}
    return found | ({"subject": subject} if isinstance(subject, str) else {})


def deal(question: Question) -> list[Question]:
    """Deals a question without a split: by a hash of its id, half are trained on and asked again."""

    def as_split(split: str, suffix: str = "") -> Question:
        return Question(f"{question.id}{suffix}", question.text, question.answers, split, question.passages, question.subject)

    if hashlib.sha256(question.id.encode()).digest()[0] % 2:
        return [as_split("untrained")]
    return [as_split("train", "/train"), as_split("seen")]


def _answers(place: str, row: dict[str, Any]) -> tuple[str, ...]:
    answers = _strings(place, row, "golden_answers")
    answers = tuple(answer for answer in answers if answer.strip())
    if not answers:
        raise UserError(f"{place}: question '{row['id']}' has no answers ('golden_answers' is empty)")
    return answers


def _gold(place: str, row: dict[str, Any], answers: tuple[str, ...], gold: Gold, without: list[str]) -> tuple[str, ...]:
    """Reads the ids of a question's gold passages: of a document those that hold an accepted answer.

    Where none does they are all of the document's, and the question's id goes to `without`.
    """
    found: dict[str, None] = {}
    for passage in _strings(place, row, "passages") if "passages" in row else ():
        if passage not in gold:
            close = difflib.get_close_matches(passage, itertools.islice(gold, 100_000), n=1, cutoff=0.0)
            raise UserError(
                f"{place}: gold passage '{passage}' of question '{row['id']}' matches nothing in the corpus "
                f"(nearest: '{close[0]}'; ids with '#' depend on the chunk size)"
            )
        own = gold[passage]
        with_answer = holding(own, answers) if len(own) > 1 else list(own)
        if not with_answer:
            without.append(row["id"])
        found |= dict.fromkeys(one.id for one in with_answer or own)
    return tuple(found)


def _split(place: str, row: dict[str, Any]) -> str:
    if "split" not in row:
        return ""
    split = _string(place, row, "split")
    if split not in SPLITS:
        raise UserError(f"{place}: unknown split '{split}'. {nearest(split, SPLITS)}")
    return split


def _texts(root: Path, name: str) -> tuple[str, ...]:
    return tuple(_string(place, row, "contents") for place, row in _rows(root, name)) if (root / name).exists() else ()


def _rows(root: Path, name: str) -> list[tuple[str, dict[str, Any]]]:
    """Returns ("file:line", row) for every line that is not blank; ids are unique strings (numbers become strings)."""
    return list(_stream_rows(root, name, {}))


def _stream_rows(root: Path, name: str, places: dict[str, str] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields what `_rows` returns, reading a line at a time.

    Args:
      places: filled with where each id stands, and a second row of an id is refused. None: ids may repeat.
    """
    file = root / name
    if not file.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{file} is a link that leads outside {root}; copy the file instead")
    for place, line in _lines(file):
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:  # ValueError: broken JSON, endless numbers, lone surrogates
            raise UserError(f"{place}: not valid JSON ({getattr(error, 'msg', None) or getattr(error, 'reason', error)})") from error
        if not isinstance(row, dict):
            raise UserError(f"{place}: expected a JSON object, got {type(row).__name__}")
        if isinstance(row.get("id"), int) and not isinstance(row["id"], bool):
            row["id"] = str(row["id"])
        identity = _string(place, row, "id")
        if places is not None:
            if identity in places:
                raise UserError(f"{place}: id '{identity}' is taken by {places[identity]}")
            places[identity] = place
        yield place, row


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """Yields ("file:line", text) of the lines that are not blank. Only a newline ends a line: JSON allows U+2028 in a string."""
    try:
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if text := _utf8(file, line if number > 1 else line.removeprefix(codecs.BOM_UTF8), lines.tell() - len(line)).strip():
                    yield f"{file}:{number}", text
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error


def _utf8(file: Path, data: bytes, at: int) -> str:
    """Decodes what stands in `file` from byte `at` on."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 (byte {at + error.start}); convert it: iconv -f latin1 -t utf-8") from error


def _read(file: Path) -> str:
    try:
        return _utf8(file, file.read_bytes().removeprefix(codecs.BOM_UTF8), 0)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error


def _string(place: str, row: dict[str, Any], key: str, *, empty: bool = False) -> str:
    if key not in row:
        raise UserError(f"{place}: '{key}' is missing (there is: {', '.join(map(repr, row)) or 'nothing'})")
    value = row[key]
    if not isinstance(value, str):
        raise UserError(f"{place}: '{key}' must be a string, got {json.dumps(value)[:40]}")
    if not empty and not value.strip():
        raise UserError(f"{place}: '{key}' is empty")
    return value


def _strings(place: str, row: dict[str, Any], key: str) -> tuple[str, ...]:
    if key not in row:
        raise UserError(f"{place}: '{key}' is missing (there is: {', '.join(map(repr, row))})")
    values = row[key]
    if not isinstance(values, list) or not all(isinstance(value, str | int) and not isinstance(value, bool) for value in values):
        raise UserError(f"{place}: '{key}' must be a list of strings, got {json.dumps(values)[:40]}")
    return tuple(map(str, values))
