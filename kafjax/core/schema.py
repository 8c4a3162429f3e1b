"""Checks of JSON files: each reader names the type that it expects.

    class Rows(TypedDict):
        seq_len: Count
        padding: Share

    about = read(Rows, folder / "rows.json", fix="pack it anew")

A type is a TypedDict or a dataclass; arrays become its tuples. Keys that the type does not name are
left out. pydantic compares, and converts nothing else.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic

from kafjax.core.errors import UserError
from kafjax.core.rundir import read_json, read_jsonl
from kafjax.core.text import shortened

T = TypeVar("T")
Count = Annotated[int, pydantic.Field(ge=0, le=2**53)]
"""A whole number that all readers of JSON agree on."""
Amount = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, pydantic.Field(ge=0, le=1)]


def read(kind: type[T], path: Path, *, fix: str = "") -> T:
    """Reads a JSON file that holds a `kind`. Raises `UserError` as `read_json` and `checked` do."""
    return checked(kind, read_json(path), path, fix=fix)


def read_rows(kind: type[T], path: Path, *, fix: str = "") -> list[T]:
    """Reads a file of one `kind` a line. Raises `UserError` as `read_jsonl` and `checked` do."""
    return [
        checked(kind, row, f"{path}: row {number}", fix=fix)
        for number, row in enumerate(read_jsonl(path), 1)
    ]


def checked(kind: type[T], value: Any, where: Path | str, *, fix: str = "") -> T:
    """Converts a value read from JSON into `kind`, after checking it.

    Args:
      where: what holds the value, for the message.
      fix: what the user can do.

    Raises:
      UserError: naming `where`, the first key that is missing or of another type or range, and
        `fix`.
    """
    return parsed(kind, json.dumps(value), where, fix=fix)


def parsed(kind: type[T], text: str | bytes, where: Path | str, *, fix: str = "") -> T:
    """Converts JSON into `kind`, as `checked` does, and reads it only once.

    Raises:
      UserError: as `checked`, and for what is no JSON.
    """
    try:
        return _adapter(kind).validate_json(text, strict=True)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))[:80]
        if first["type"] == "json_invalid":
            told = "it is damaged"
        elif first["type"].startswith("missing"):
            told = "it is missing"
        else:
            told = f"{_lower(first['msg'])}, not {_shown(first['input'])}"
        raise UserError(
            f"{where}: {place + ': ' if place else ''}{told}{'; ' + fix if fix else ''}"
        ) from error


@functools.cache
def _adapter(kind: Any) -> pydantic.TypeAdapter:
    return pydantic.TypeAdapter(kind)


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:150]


def _shown(value: Any) -> str:
    """Shows a value in a few characters; of a container, its size."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    return shortened(value, 60)
