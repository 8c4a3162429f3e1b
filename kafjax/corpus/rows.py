"""Rows of a corpus's files: JSON lines (also gzipped), CSV, TSV and Parquet, read one at a time,
each with its place.

Files from elsewhere are messy in known ways, which are read: numeric ids, a BOM, CRLF, blank lines.
Everything else is refused, by file and line.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import dataclasses
import gzip
import itertools
import json
import os
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import IO, Any

from kafjax.core.errors import UserError
from kafjax.core.text import shortened

KINDS = (".jsonl", ".jsonl.gz", ".parquet", ".csv", ".tsv")
"""Endings of the files that hold rows, in the order in which they are looked for."""
_BOMS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One row: its values, its place "file:line" for messages, its line or number from 1, and its
    bytes in the file, where it has some."""

    values: dict[str, Any]
    place: str
    number: int
    bytes: tuple[int, int] | None = None


def find(root: Path, name: str) -> Path | None:
    """Finds the file of rows called `name` in a folder, whatever its kind."""
    return next((file for kind in KINDS if (file := root / f"{name}{kind}").exists()), None)


def read(root: Path, file: Path, places: dict[str, str] | None, key: str = "id") -> Iterator[Row]:
    """Yields the rows of a file. Ids become strings.

    Args:
      root: the folder that the file must lie in, links followed.
      places: filled with where each id stands, and a second row of an id is refused. None: ids may
        repeat.
      key: the name of the id: "id", or BEIR's "_id".

    Raises:
      UserError: naming file and line, for whatever is not a row with an id.
    """
    if not lies_inside(root, file):
        raise UserError(f"{file} is a link that leads outside {root}; copy the file instead")
    for row in _readers()[file.suffix.lower()](file):
        identity = row.values.get(key)
        if isinstance(identity, int) and not isinstance(identity, bool):
            row.values[key] = str(identity)
        identity = string(row.place, row.values, key)
        if places is not None:
            if identity in places:
                raise UserError(f"{row.place}: id '{identity}' is taken by {places[identity]}")
            places[identity] = row.place
        yield row


def lies_inside(root: Path, file: Path) -> bool:
    """True if a file lies in the folder, links followed. A link that goes round in circles lies
    where it stands."""
    return Path(os.path.realpath(file)).is_relative_to(os.path.realpath(root))


def _readers() -> dict[str, Callable[[Path], Iterator[Row]]]:
    return {".jsonl": _json, ".gz": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}


def _json(file: Path) -> Iterator[Row]:
    for number, line, span in lines(file):
        place = f"{file}:{number}"
        try:
            values = json.loads(line)
            json.dumps(values, ensure_ascii=False).encode()
        # ValueError: broken JSON, endless numbers, lone surrogates
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{place}: not valid JSON ({getattr(error, 'msg', None) or getattr(error, 'reason', error)})"
            ) from error
        if not isinstance(values, dict):
            raise UserError(f"{place}: expected a JSON object, got {type(values).__name__}")
        yield Row(values, place, number, None if file.suffix == ".gz" else span)


def lines(file: Path) -> Iterator[tuple[int, str, tuple[int, int]]]:
    """Yields number, text and bytes of the lines that are not blank. Only a newline ends a line:
    JSON allows U+2028 in a string."""
    at = 0
    with _opened(file) as stream:
        for number, line in enumerate(stream, 1):
            head = len(codecs.BOM_UTF8) if number == 1 and line.startswith(codecs.BOM_UTF8) else 0
            if text := utf8(file, line[head:], at + head).strip():
                yield number, text, (at + head, at + len(line))
            at += len(line)


@contextlib.contextmanager
def _opened(file: Path) -> Generator[IO[bytes]]:
    try:
        with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as stream:
            yield stream  # ty: ignore[invalid-yield]
    except (OSError, EOFError) as error:  # EOFError: a gzip file that was cut short
        raise UserError(
            f"cannot read {file}: {getattr(error, 'strerror', None) or error}"
        ) from error


def _csv(file: Path) -> Iterator[Row]:
    """Reads a table with a header. A cell that holds a JSON list or object is one; an empty cell is
    absent."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    table = csv.DictReader(
        _table_lines(file), delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True
    )
    try:
        for number, cells in enumerate(table, 2):
            if None in cells or None in cells.values():
                raise UserError(f"{file}: row {number}: has not as many cells as the header")
            yield Row(
                {name: _cell(value) for name, value in cells.items() if value},
                f"{file}: row {number}",
                number,
            )
    except csv.Error as error:
        raise UserError(f"{file}:{table.line_num}: not valid CSV ({error})") from error


def _table_lines(file: Path) -> Iterator[str]:
    at = 0
    with _opened(file) as table:
        for line in table:
            yield utf8(file, line if at else line.removeprefix(codecs.BOM_UTF8), at)
            at += len(line)


def _cell(text: str) -> Any:
    if text[0] in "[{":
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(text)
    return text


def _parquet(file: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError(
            f"{file}: reading Parquet needs the package pyarrow; pip install pyarrow, or write the rows as .jsonl"
        ) from error
    try:
        numbers = itertools.count(1)
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(1024):
                for values, number in zip(batch.to_pylist(), numbers, strict=False):
                    yield Row(
                        {k: v for k, v in values.items() if v is not None},
                        f"{file}: row {number}",
                        number,
                    )
    except (ArrowException, OSError) as error:
        raise UserError(f"cannot read {file}: {shortened(str(error), 100, str)}") from error


def utf8(file: Path, data: bytes, at: int = 0) -> str:
    """Decodes what stands in `file` from byte `at` on. Raises `UserError` with the command that
    converts the file."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        from_ = next((name for bom, name in _BOMS.items() if not at and data.startswith(bom)), None)
        # 0x80 to 0x9f are quotes and dashes there, and control characters in latin1.
        from_ = from_ or (
            "windows-1252"
            if any(0x80 <= byte < 0xA0 for byte in data[error.start : error.start + 1])
            else "latin1"
        )
        raise UserError(
            f"{file}: not UTF-8 (byte {at + error.start}); convert it: iconv -f {from_} -t utf-8"
        ) from error


def string(place: str, values: dict[str, Any], key: str, *, empty: bool = False) -> str:
    """Returns the string under `key`. Raises `UserError` where it is missing, something else, or
    empty against `empty`."""
    if key not in values:
        raise UserError(
            f"{place}: '{key}' is missing (there is: {', '.join(map(repr, values)) or 'nothing'})"
        )
    value = values[key]
    if not isinstance(value, str):
        raise UserError(f"{place}: '{key}' must be a string, got {_shown(value)}")
    if not empty and not value.strip():
        raise UserError(f"{place}: '{key}' is empty")
    return value


def strings(place: str, values: dict[str, Any], key: str) -> tuple[str, ...]:
    """Returns the strings under `key`: a list of strings or whole numbers, or a single one."""
    if key not in values:
        raise UserError(f"{place}: '{key}' is missing (there is: {', '.join(map(repr, values))})")
    value = values[key]
    found = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str | int) and not isinstance(one, bool) for one in found):
        raise UserError(f"{place}: '{key}' must be a list of strings, got {_shown(value)}")
    return tuple(map(str, found))


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)[:40]
