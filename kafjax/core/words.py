"""Words of any script, by Unicode's properties: where they begin and end, and which scripts put no
blanks between them.

Everything here takes time linear in the text.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import regex

UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Line_Break=Complex_Context}\p{Tibetan}\u3001-\u30ff\uff01-\uff9f"
"""Inside of a character class: scripts without blanks between words, with their punctuation and
full-width forms.

Unicode's line-breaking class "complex context" is Thai, Lao, Khmer, Burmese and their relatives.
"""
LONGEST = 48
"""Characters of the longest run that counts as one word. A longer one, such as an address, counts a
word for each `PIECE`."""
PIECE = 12
# A letter with its marks, or an emoji with what is joined to it, is never cut in two: `\X` is one
# grapheme.
_UNIT = regex.compile(rf"(?P<single>(?=[{UNSPACED}])\X)|[^\s{UNSPACED}]+")
_GRAPHEME = regex.compile(r"\X")
_RUN = re.compile(r"\S+")


def word_spans(text: str) -> Iterator[tuple[int, int]]:
    """Yields (start, end) of each word.

    Scripts without blanks count a word for each letter with its marks, and a run of over `LONGEST`
    other characters one for each `PIECE`: about as many as an encoder has tokens for them.
    """
    for run in _RUN.finditer(text):
        start, end = run.span()
        if end - start <= LONGEST and run[0].isascii():  # nearly all, and quickly found
            yield start, end
        else:
            yield from _pieces(text, start, end)


def _pieces(text: str, first: int, behind: int) -> Iterator[tuple[int, int]]:
    for unit in _UNIT.finditer(text, first, behind):
        start, end = unit.span()
        if end - start <= LONGEST:
            yield start, end
            continue
        for grapheme in _GRAPHEME.finditer(text, start, end):
            if grapheme.end() - start >= PIECE:
                yield start, min(grapheme.end(), start + LONGEST)
                yield from (
                    (at, min(at + LONGEST, grapheme.end()))
                    for at in range(start + LONGEST, grapheme.end(), LONGEST)
                )
                start = grapheme.end()
        if start < end:
            yield start, end


def words(text: str) -> list[str]:
    """Splits a text into words, each with a space before it where white space stood; joined they
    are the text, white space normalised."""
    found, last = [], -1
    for start, end in word_spans(text):
        found.append(text[start:end] if start == last else f" {text[start:end]}")
        last = end
    return found


def has_more_words(text: str, n: int) -> bool:
    """True if the text has more than `n` words. Reads no further than that."""
    return next(itertools.islice(word_spans(text), n, None), None) is not None
