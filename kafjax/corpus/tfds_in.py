"""Corpora from TensorFlow Datasets, read without TensorFlow: `tfds:NAME[/CONFIG][@SPLIT]`.

Datasets lie prepared as ArrayRecord files under `$TFDS_DATA_DIR` (`~/tensorflow_datasets` by
default); `scripts/build_dataset.py` prepares them. Reading never downloads: many processes would
all do it.

  biographies, factbook,    our own builders; the folder holds a whole corpus. CONFIG is the only one there is, or one of several.
  srd
  squad                     contexts are documents, the sentences that hold an answer its gold passages
  trivia_qa                 pages of Wikipedia are documents (config `rc`), or there are none (`rc.nocontext`)
  natural_questions_open    questions without documents

SPLIT is TFDS's, such as `validation` (by default) or `train[:1000]`. Questions of a public dataset
are dealt to what is trained on and asked again, and what is only asked, as in a folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from kafjax.core.errors import UserError, nearest
from kafjax.core.records import Corpus, Document, Passage, Question
from kafjax.corpus.chunking import cut, deduplicate
from kafjax.corpus.gold import holding
from kafjax.corpus.questions import deal
from kafjax.corpus.tfds_rows import LISTS, SPLITS, TEXTS, corpus_of

PREFIX = "tfds:"
GENERATED = {"biographies": "Biographies", "factbook": "Factbook", "srd": "Srd"}


def tfds() -> Any:
    """Imports TFDS. Raises `UserError` with the install command if it is missing."""
    try:
        return importlib.import_module("tensorflow_datasets")
    except ImportError as error:
        raise UserError(
            "TensorFlow Datasets is not installed; run: pip install 'kafjax[data]' (TensorFlow is not needed)"
        ) from error


def data_dir() -> Path:
    """The folder of prepared datasets. Raises `UserError` for a user without a home and without
    `$TFDS_DATA_DIR`."""
    try:
        return Path(
            os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets"
        ).expanduser()
    except RuntimeError as error:
        raise UserError(
            "this user has no home folder; set TFDS_DATA_DIR to the one of the datasets"
        ) from error


def generated_builder(name: str, config: Any = None, folder: Path | None = None) -> Any:
    """The builder of one of `GENERATED`."""
    tfds()
    module = importlib.import_module(f"kafjax.corpus.builders.{name}_dataset_builder")
    return getattr(module, GENERATED[name])(
        config=config, data_dir=os.fspath(folder or data_dir()), file_format="array_record"
    )


def load_tfds(source: str, size: str | int | None = None, overlap: int = 0) -> Corpus:
    """Reads `tfds:NAME[/CONFIG][@SPLIT]`; the module's docstring says what is in it.

    `size` and `overlap` cut the documents of public datasets into passages, as in `load_folder`;
    what a builder of ours has written comes with its passages.

    Raises:
      UserError: an unknown name, a dataset that is not prepared, TFDS not installed.
    """
    path, _, split = source.removeprefix(PREFIX).partition("@")
    name, _, config = path.partition("/")
    if name in GENERATED:
        if split:
            raise UserError(f"{source}: {name} is a whole corpus, which has no split to choose")
        return _own(source, name, config)
    if name not in PUBLIC:
        raise UserError(
            f"{source}: unknown dataset '{name}'. {nearest(name, [*GENERATED, *PUBLIC])}"
        )
    builder = _builder(source, path)
    documents, questions = PUBLIC[name](_read(source, builder, split or "validation"))
    if not questions:
        raise UserError(f"{source}: no question has an answer")
    passages, _ = deduplicate(cut(documents, size, overlap))
    dealt = [question for each in _with_gold(questions, passages) for question in deal(each)]
    return Corpus(
        name=name,
        documents=tuple(documents),
        passages=passages,
        training_questions=tuple(q for q in dealt if q.split == "train"),
        questions=tuple(q for q in dealt if q.split != "train"),
    )


def _own(source: str, name: str, config: str) -> Corpus:
    root = data_dir() / name
    # By configuration, the newest version; what a kill has left behind is called `incomplete`.
    folders = [
        folder for folder in sorted(root.glob("*/*/")) if not folder.name.startswith("incomplete")
    ]
    there = {
        folder.parent.name: folder for folder in folders if (folder / "dataset_info.json").exists()
    }
    if not there or (config and config not in there):
        what = f"has {', '.join(there)}" if there else "is not there"
        raise UserError(
            f"{source} is not prepared: {root} {what}; run: python scripts/build_dataset.py --dataset={name}"
        )
    if len(there) > 1 and not config:
        raise UserError(
            f"{source}: {root} holds several; say which: {', '.join(f'tfds:{name}/{each}' for each in there)}"
        )
    folder = there[config or next(iter(there))]
    try:
        builder = tfds().builder_from_directory(folder)
    except Exception as error:  # whatever a damaged description makes TFDS raise
        raise _damaged(source, folder, error) from error
    return corpus_of(
        name,
        {
            split: map(_own_row, _read(source, builder, split))
            for split in SPLITS
            if split in builder.info.splits
        },
    )


def _own_row(row: dict[str, Any]) -> dict[str, Any]:
    return {name: _text(row[name]) for name in TEXTS} | {
        name: list(map(_text, row[name])) for name in LISTS
    }


def _builder(source: str, path: str) -> Any:
    try:
        return tfds().builder(path, data_dir=os.fspath(data_dir()), file_format="array_record")
    except (ValueError, KeyError, tfds().core.DatasetNotFoundError) as error:
        raise UserError(f"{source}: {(str(error).splitlines() or ['unknown'])[0]}") from error


def _read(source: str, builder: Any, split: str) -> Iterator[dict[str, Any]]:
    """The rows of a split, in their order, through Grain.

    Raises, when the first row is asked for or later:
      UserError: no such split, a file is missing or damaged (each record has a checksum).
    """
    grain = importlib.import_module("grain")
    try:
        rows = builder.as_data_source(split=split)
    # TFDS raises what it finds: nothing there, a split that does not exist, files of another format
    except Exception as error:
        if builder.info.splits:
            raise UserError(
                f"{source}, split {split}: {(str(error).splitlines() or [type(error).__name__])[0][:200]}"
            ) from error
        command = f"python scripts/build_dataset.py --dataset={source.removeprefix(PREFIX).partition('@')[0]}"
        raise UserError(
            f"{source} is not prepared in {data_dir()}; on a machine with a network run: {command}"
        ) from error
    try:
        yield from grain.MapDataset.source(rows)
    # RuntimeError of its readers, or what TFDS makes of a record that is none
    except Exception as error:
        raise _damaged(source, Path(builder.data_dir), error) from error


def _damaged(source: str, folder: Path, error: Exception) -> UserError:
    told = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return UserError(
        f"{source}: {folder} is not whole ({told}); delete that folder and prepare it anew with scripts/build_dataset.py"
    )


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _answers(values: Iterable[Any]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for value in values if (text := _text(value).strip())))


def _squad(rows: Iterable[dict[str, Any]]) -> tuple[list[Document], list[Question]]:
    documents: dict[str, Document] = {}
    questions = []
    for row in rows:
        context, title = _text(row["context"]), _text(row["title"]).replace("_", " ")
        document = documents.setdefault(context, Document(_document_id(context), context, title))
        questions.append(
            _question(_text(row["id"]), row["question"], row["answers"]["text"], document.id)
        )
    return list(documents.values()), [question for question in questions if question.answers]


def _trivia_qa(rows: Iterable[dict[str, Any]]) -> tuple[list[Document], list[Question]]:
    documents: dict[str, Document] = {}
    questions = []
    for row in rows:
        pages = row["entity_pages"]
        own = []
        for title, text in zip(
            map(_text, pages["title"]), map(_text, pages["wiki_context"]), strict=False
        ):
            if text.strip():
                own.append(documents.setdefault(text, Document(_document_id(text), text, title)).id)
        answers = [row["answer"]["value"], *row["answer"]["aliases"]]
        questions.append(_question(_text(row["question_id"]), row["question"], answers, *own))
    return list(documents.values()), [question for question in questions if question.answers]


def _natural_questions_open(
    rows: Iterable[dict[str, Any]],
) -> tuple[list[Document], list[Question]]:
    questions = [
        _question(f"nq{number}", row["question"], row["answer"]) for number, row in enumerate(rows)
    ]
    return [], [question for question in questions if question.answers]


PUBLIC: dict[str, Callable[[Iterable[dict[str, Any]]], tuple[list[Document], list[Question]]]] = {
    "squad": _squad,
    "trivia_qa": _trivia_qa,
    "natural_questions_open": _natural_questions_open,
}


def _document_id(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _question(identity: str, text: Any, answers: Iterable[Any], *documents: str) -> Question:
    """Makes a question, with the ids of its documents in place of its passages."""
    return Question(
        id=identity,
        text=_text(text).strip(),
        answers=_answers(answers),
        split="",
        passages=documents,
    )


def _with_gold(questions: Iterable[Question], passages: Iterable[Passage]) -> list[Question]:
    """Puts the passages that hold an answer where the ids of a question's documents stand; all of
    them, if none does."""
    of_document: dict[str, list[Passage]] = defaultdict(list)
    for passage in passages:
        of_document[passage.document].append(passage)

    def gold(question: Question) -> tuple[str, ...]:
        own = [passage for document in question.passages for passage in of_document[document]]
        return tuple(passage.id for passage in holding(own, question.answers) or own)

    return [dataclasses.replace(question, passages=gold(question)) for question in questions]
