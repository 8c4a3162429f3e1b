"""Regular expressions from flags and files. Endless backtracking becomes a `UserError`."""

from __future__ import annotations

import functools
import re

import regex

from kafjax.core.errors import UserError

SECONDS = 1.0
"""Longest time that one search may take. A pattern over a parameter's path takes microseconds."""
LONGEST = 10_000
"""Characters that a pattern may have."""


def check(pattern: str) -> None:
    """Raises `UserError` unless `pattern` is a regular expression in the syntax of `re`."""
    _compiled(pattern)


def search(pattern: str, text: str) -> re.Match[str] | None:
    """`re.search`, bounded in time. Raises `UserError` if `pattern` is invalid or takes longer than
    `SECONDS`."""
    return _run("search", pattern, text)


def match(pattern: str, text: str) -> re.Match[str] | None:
    """`re.match`, bounded likewise."""
    return _run("match", pattern, text)


def fullmatch(pattern: str, text: str) -> re.Match[str] | None:
    """`re.fullmatch`, bounded likewise."""
    return _run("fullmatch", pattern, text)


def _compiled(pattern: str) -> re.Pattern[str]:
    if not isinstance(pattern, str):
        raise UserError(f"{pattern!r:.80}: not a regular expression (no string)")
    return _compile(pattern)


# an adapter can have a pattern for each kernel of a large model, tried on all of them
@functools.lru_cache(maxsize=4096)
def _compile(pattern: str) -> re.Pattern[str]:
    if len(pattern) > LONGEST:
        raise UserError(f"{pattern[:80]!r}...: a regular expression of over {LONGEST} characters")
    try:
        re.compile(pattern)  # the syntax is that of `re`; `regex` accepts more
        return regex.compile(pattern, regex.VERSION0)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise UserError(f"{pattern[:80]!r}: not a regular expression ({error})") from error


def _run(how: str, pattern: str, text: str) -> re.Match[str] | None:
    try:
        return getattr(_compiled(pattern), how)(text, timeout=SECONDS)
    except TimeoutError as error:
        raise UserError(
            f"{pattern[:80]!r}: this regular expression takes over {SECONDS:g} s on '{text[:80]}'; write it simpler"
        ) from error
