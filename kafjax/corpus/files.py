"""Documents of a folder of files: which are read, how, and which are passed over, with what to do
about it."""

from __future__ import annotations

import codecs
import collections
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from absl import logging

from kafjax.core.errors import UserError
from kafjax.core.records import Cut, Document, Source
from kafjax.core.text import visible
from kafjax.corpus import rows
from kafjax.corpus.chunking import PAGES
from kafjax.corpus.convert import CONVERTERS, convert
from kafjax.corpus.markdown import MARKDOWN, clean

TEXTS = (".txt", ".md", ".markdown")
MOST_BYTES = 2**28
"""Bytes of the largest file that is read as one document."""
_KNOWN = ("corpus", "questions", "queries", "held_out", "replay")


def read_documents(root: Path) -> Iterator[Document]:
    """Yields a document for each text file of a folder, sorted by path; ids are relative paths.

    Tells in one line of all files that are not read, and why.

    Raises:
      UserError: a file that is broken or no UTF-8.
    """
    passed_over = _PassedOver()
    for file in sorted(root.rglob("*")):
        name = file.relative_to(root)
        if hidden := next((part for part in name.parts if part.startswith(".")), None):
            passed_over.add("hidden", hidden)
        elif file.is_dir() or _is_rows(name):
            continue
        elif not rows.lies_inside(root, file):
            passed_over.add("leads outside", name)
        elif file.suffix.lower() not in (*TEXTS, *CONVERTERS):
            passed_over.add(file.suffix.lower() or "no ending", name)
        elif not file.is_file():
            passed_over.add("no file", name)
        elif _size(file) > MOST_BYTES:
            passed_over.add("too large", name)
        else:
            document = _read(file, utf8_name(name))
            if document.text.strip():
                yield document
            else:
                passed_over.add("scanned" if file.suffix.lower() == ".pdf" else "empty", name)
    passed_over.tell(root)


def tell_of_others(root: Path, read: Path) -> None:
    """Tells of text files beside a file of rows: they are not read."""
    others = [
        file.relative_to(root)
        for file in sorted(root.rglob("*"))
        if file.suffix.lower() in (*TEXTS, *CONVERTERS)
    ]
    others = [name for name in others if not any(part.startswith(".") for part in name.parts)]
    if others:
        example = f"{len(others)} text files beside it are not read, such as {visible(utf8_name(others[0]))}"
        logging.warning("%s is the corpus; %s", read, example)


def utf8_name(path: Path) -> str:
    """Spells a path as text; bytes of it that are no UTF-8 become escapes."""
    return os.fsencode(path.as_posix()).decode(errors="backslashreplace")


_FIXES = {
    "hidden": "hidden; rename what shall be read",
    "leads outside": "links that lead outside; copy the files",
    "no file": "no file that can be read",
    "too large": f"over {MOST_BYTES >> 20} MB; split it, or write corpus.jsonl",
    "scanned": "without text, such as a scan; run OCR on it (ocrmypdf)",
    "empty": "empty",
}


class _PassedOver:
    """Files that are not read, by the reason."""

    def __init__(self) -> None:
        self._by_reason: dict[str, collections.Counter[str]] = collections.defaultdict(
            collections.Counter
        )

    def add(self, reason: str, name: Path | str) -> None:
        self._by_reason[reason][utf8_name(Path(name))] += 1

    def tell(self, root: Path) -> None:
        told = []
        for reason, names in self._by_reason.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            fix = (
                f"name it corpus{reason} or questions{reason}, in the folder itself"
                if reason in rows.KINDS
                else "convert to .md or .txt what shall be read"
            )
            why = _FIXES.get(reason, f"{reason}; {fix}")
            told.append(f"{visible(next(iter(names)))}{more} ({why})")
        if told:
            logging.warning("%s: not read: %s", root, "; ".join(told))


def _is_rows(name: Path) -> bool:
    return len(name.parts) == 1 and any(
        name.name == f"{known}{kind}" for known in _KNOWN for kind in rows.KINDS
    )


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error


def _read(file: Path, name: str) -> Document:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error
    suffix, source = file.suffix.lower(), Source(name)
    if suffix in CONVERTERS:
        return Document(
            name, convert(file, data), format=PAGES if suffix == ".pdf" else MARKDOWN, source=source
        )
    has_bom = data.startswith(codecs.BOM_UTF8)
    text = rows.utf8(file, data.removeprefix(codecs.BOM_UTF8))
    bom = (Cut(0, len(codecs.BOM_UTF8), 0),) if has_bom else ()
    if suffix == ".txt":
        return Document(name, text, source=source, cuts=bom)
    text, title, cuts = clean(text)
    return Document(name, text, title, MARKDOWN, source, (*bom, *cuts))


def row_source(file: Path, row: rows.Row) -> Source:
    """Makes the source of a document that is a row of a file: its line and its bytes, where it has
    some."""
    return dataclasses.replace(Source(file.name, lines=(row.number, row.number)), bytes=row.bytes)
