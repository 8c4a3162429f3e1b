"""Patterns from outside mean what they mean to `re`, and end."""

from __future__ import annotations

import re
import time

import pytest

from kafjax.core import patterns
from kafjax.core.errors import UserError

PATH = "layers/11/attention/q_proj/kernel"


def test_a_pattern_that_backtracks_without_end_is_refused_within_seconds() -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match="takes over 1 s"):
        patterns.search("(a|aa)+[bc]", "a" * 60 + "d")
    assert time.monotonic() - began < 10


def test_a_pattern_that_holds_up_re_for_minutes_is_answered_within_seconds() -> None:
    began = time.monotonic()
    assert patterns.search("(.*)*Z(.*)*Q", "model.layers.0.self_attn.q_proj" * 3 + "Z" * 5) is None
    assert time.monotonic() - began < 10


PATTERNS = [
    r"^layers/",
    r"(q|k)_proj",
    r"(?!.*q_proj).*",
    r"(?<=/)11(?=/)",
    r"(?i)Q_PROJ",
    r"[[a]",
    r".*/(\d+)/",
]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("how", ["search", "match", "fullmatch"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_matches_are_those_of_re(pattern: str, how: str) -> None:
    ours, theirs = getattr(patterns, how)(pattern, PATH), getattr(re, how)(pattern, PATH)
    assert (ours and (ours.span(), ours.groups())) == (theirs and (theirs.span(), theirs.groups()))


@pytest.mark.parametrize("pattern", ["(", "*a", "a" * 20_000, 3])
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(UserError, match="regular expression"):
        patterns.check(pattern)
