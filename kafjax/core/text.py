"""Text from outside, made safe to print."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import Any

_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_JOINERS = "\u200c\u200d"  # Persian, Indic scripts and emoji need them


def visible(text: str) -> str:
    r"""Shows control characters, direction overrides, line separators and lone surrogates as
    escapes such as `\x1b`.

    Line feed and tab stay.
    """
    return "".join(
        c if c in "\n\t" or c in _JOINERS or unicodedata.category(c) not in _HIDDEN else _escape(c)
        for c in text
    )


def shortened(value: Any, most: int = 80, spelled: Callable[[Any], str] = repr) -> str:
    """Shows a value from outside in `most` characters and three dots. A number of many digits is
    not spelled out."""
    text = (
        "a number of many digits"
        if isinstance(value, int) and abs(value) >= 10**30
        else spelled(value)
    )
    return text if len(text) <= most else f"{text[:most]}..."


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()
