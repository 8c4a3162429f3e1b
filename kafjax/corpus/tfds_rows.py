"""A corpus as TFDS sees it: one TFDS split for each field of `Corpus`, all with the same
features."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from kafjax.core.records import Corpus, Document, Passage, Question

Row = dict[str, Any]
TEXTS = ("id", "text", "title", "document", "split", "subject")
LISTS = ("answers", "passages")
_RECORDS = {
    "documents": Document,
    "passages": Passage,
    "training_questions": Question,
    "questions": Question,
    "retention": Question,
    "replay_questions": Question,
    "supervised_questions": Question,
}
SPLITS = (*_RECORDS, "held_out_texts", "replay_texts")


def corpus_rows(corpus: Corpus) -> dict[str, list[Row]]:
    """Rows by TFDS split; a split without rows is left out."""
    empty = {**dict.fromkeys(TEXTS, ""), **{name: [] for name in LISTS}}

    def row(number: int, record: Any) -> Row:
        if isinstance(record, str):
            return {**empty, "id": str(number), "text": record}
        names = {field.name for field in dataclasses.fields(record)} & {*TEXTS, *LISTS}
        fields = {name: getattr(record, name) for name in names}
        return {
            **empty,
            **{name: list(value) if name in LISTS else value for name, value in fields.items()},
        }

    found = {
        split: [row(i, record) for i, record in enumerate(getattr(corpus, split))]
        for split in SPLITS
    }
    return {split: rows for split, rows in found.items() if rows}


def corpus_of(name: str, splits: Mapping[str, Iterable[Row]]) -> Corpus:
    """Inverse of `corpus_rows`."""

    def record(split: str, row: Row) -> Any:
        if split not in _RECORDS:
            return row["text"]
        kind = _RECORDS[split]
        fields = {field.name for field in dataclasses.fields(kind)}
        values: dict[str, Any] = {
            key: tuple(value) if key in LISTS else value
            for key, value in row.items()
            if key in fields
        }
        return kind(**values)

    found = {split: tuple(record(split, row) for row in splits.get(split, ())) for split in SPLITS}
    return Corpus(name=name, **found)
