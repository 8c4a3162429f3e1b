"""The language of docstrings and pages: docstrings open with a verb or a noun phrase, pages are
wrapped; and proof of the reader."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("kafjax", "experiments", "launch", "scripts", "benchmarks", "tests")
# A docstring that opens with one of these opens with no verb and no noun: it is a relative clause,
# a genitive or an adverbial.
NOT_OPENINGS = set(
    "after also as at before beside between by during for from held how if in into kept made not of on since so something that these they "
    "those through to under what whatever when where whether which who whoever whom whose why with within without".split()
)
WIDTH = 100


def odd_openings(source: str) -> Iterator[tuple[int, str]]:
    """Yields (line, first line of the docstring) for each docstring that opens with one of
    `NOT_OPENINGS`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            if (word := re.match(r"[A-Za-z]+\b", text)) and word[0].lower() in NOT_OPENINGS:
                yield node.body[0].lineno, text.splitlines()[0]


def long_lines(page: str) -> Iterator[int]:
    """Yields the numbers of prose lines over `WIDTH` columns. Tables, code and lines of a single
    word are exempt."""
    in_code = False
    for number, line in enumerate(page.splitlines(), 1):
        if line.lstrip().startswith("```"):
            in_code = not in_code
        elif (
            not in_code
            and len(line) > WIDTH
            and not line.startswith(("|", "    "))
            and " " in line.strip()
        ):
            yield number


def test_docstrings_open_with_a_verb_or_a_noun_phrase():
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in files
        for line, text in odd_openings(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n" + "\n".join(found)


def test_pages_are_wrapped():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    found = [
        f"{page.relative_to(ROOT)}:{line}"
        for page in pages
        for line in long_lines(page.read_text(encoding="utf-8"))
    ]
    assert not found, f"over {WIDTH} columns: {', '.join(found)}"


@pytest.mark.parametrize(
    "source",
    [
        '"""Of the kernel that is meant."""',
        'class A:\n    """Those of the lanes that sit."""',
        'def f():\n    """What it costs."""',
        'async def f():\n    """Whether it is so."""',
        'class A:\n    def f():\n        """\n        Which one.\n        """',
    ],
)
def test_an_odd_opening_is_found(source):
    assert len(list(odd_openings(source))) == 1


@pytest.mark.parametrize(
    "opening",
    ["Returns `x`.", "Bytes of `x`.", "`x` of `y`.", "Ofen.", "The kernel of what is meant."],
)
def test_a_verb_or_a_noun_phrase_passes(opening):
    assert not list(odd_openings(f'"""{opening}"""'))


def test_only_long_prose_is_found():
    long = "word " * 30
    page = [
        "# Title",
        long,
        f"| {long} |",
        "```",
        long,
        "```",
        "x" * 200,
        f"    {long}",
        f"- {long}",
    ]
    assert list(long_lines("\n".join(page))) == [2, 9]
