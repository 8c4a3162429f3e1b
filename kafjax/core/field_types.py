"""The types that a configuration's field may have, told from its hint, and the spellings of their
values in JSON and on a command line."""

from __future__ import annotations

import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any


def value_type(hint: Any) -> Any:
    """Returns the type of a value, None aside."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return next(part for part in typing.get_args(hint) if part is not types.NoneType)
    return hint


def takes_none(hint: Any) -> bool:
    """True if a field may be None."""
    return types.NoneType in typing.get_args(hint)


def is_mapping(hint: Any) -> bool:
    """True of a mapping from patterns to numbers."""
    return typing.get_origin(value_type(hint)) in (Mapping, dict)


def is_collection(hint: Any) -> bool:
    """True of a tuple or mapping, which hold elements."""
    return typing.get_origin(value_type(hint)) is not None


def element_type(hint: Any) -> Any:
    """Returns the type of a tuple's elements, or of a mapping's values; None for a single value."""
    arguments = typing.get_args(value_type(hint))
    return (arguments[1] if is_mapping(hint) else arguments[0]) if arguments else None


def has_type(value: Any, hint: Any) -> bool:
    """True if a value, with all of its elements, is of the type of a field. A bool is no number."""
    kind = value_type(hint)
    if value is None:
        return takes_none(hint)
    if kind in (bool, str):
        return isinstance(value, kind)
    if kind is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool)
    if is_mapping(hint):
        return isinstance(value, Mapping) and all(
            isinstance(k, str) and has_type(v, element_type(hint)) for k, v in value.items()
        )
    return isinstance(value, tuple) and all(has_type(one, element_type(hint)) for one in value)


def type_name(hint: Any) -> str:
    """Names the type of a field for a message, None aside."""
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    kind = value_type(hint)
    if kind in names:
        return names[kind]
    return f"{'a mapping to' if is_mapping(hint) else 'a list of'} {names[element_type(hint)].removeprefix('a ')}"


def json_of(value: Any) -> Any:
    """Returns a field's value as JSON has it: a tuple as a list."""
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value


def text_of(value: Any) -> str:
    """Writes a single value as a command line has it, a float as briefly as it can be read back."""
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def texts_of(value: Any) -> list[str]:
    """Writes each element of a tuple or mapping; of a mapping as `KEY:VALUE`."""
    return (
        [f"{key}:{text_of(one)}" for key, one in value.items()]
        if isinstance(value, Mapping)
        else list(map(text_of, value))
    )
