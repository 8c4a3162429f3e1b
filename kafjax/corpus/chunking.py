"""Chunking of documents into passages: sentences, packed words, or whole documents. No duplicates
within a corpus.

document --blocks--> sections under one heading --sentences, lines--> parts --pack--> passages, each
with its place in the file
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

from kafjax.core.errors import UserError, nearest
from kafjax.core.records import Document, Passage, Source
from kafjax.core.words import has_more_words, word_spans
from kafjax.corpus.markdown import MARKDOWN, Block, blocks
from kafjax.corpus.sentences import sentence_spans, sentences, trim

__all__ = [
    "CHUNK_WORDS",
    "LONGEST_SENTENCE",
    "PAGES",
    "SHORT_WORDS",
    "SIZES",
    "chunk",
    "cut",
    "deduplicate",
    "parse_size",
    "sentences",
]

PAGES = "pages"
SIZES = ("sentence", "document")
SHORT_WORDS = 100
"""Without a chunk size, a document or a section of up to so many words is a passage as it is."""
CHUNK_WORDS = 64
"""Words of a passage of a longer one. Code and tables in passages of sentences are cut so, too."""
LONGEST_SENTENCE = 160
"""Words of a sentence that is a passage by itself. A longer one, such as a text without stops, is
cut."""
_QUOTE_MARK = re.compile(r"^[ \t]*(?:>[ \t]?)+", re.MULTILINE)
_CODE_QUOTE_MARK = re.compile(r"^ {0,3}(?:> ?)+")


def chunk(
    documents: Iterable[Document], size: str | int | None = "sentence", overlap: int = 0
) -> tuple[Passage, ...]:
    """Cuts documents into passages; of passages with the same text the first is kept.

    Args:
      size: "sentence", "document", or a number of words: whole sentences are then packed up to that
        many, and a longer sentence is cut between words. None: what has at most `SHORT_WORDS` stays
        whole, longer documents are packed into `CHUNK_WORDS`.
      overlap: words; whole sentences of up to that many are repeated from the passage before.

    Returns:
      passages with ids "{document.id}#0", "#1" and so on. A passage is read alone, so it begins
        with its document's title unless it
      names it. In Markdown each heading starts a passage, which begins with the path of headings
        above it; lines of code and of tables
      stay lines.

    Raises:
      UserError: an unknown size, or an overlap that is not smaller than it.
    """
    return deduplicate(cut(documents, size, overlap))[0]


def cut(
    documents: Iterable[Document], size: str | int | None = "sentence", overlap: int = 0
) -> list[Passage]:
    """Cuts documents as `chunk` does, but keeps duplicates."""
    size = None if size is None else parse_size(size)
    if not isinstance(size, int) and overlap:
        raise UserError(
            f"an overlap of {overlap} words needs a chunk size in words"
            + (f", not '{size}'" if size else "")
        )
    if isinstance(size, int) and not 0 <= overlap < size:
        raise UserError(
            f"overlap must be at least 0 and less than the chunk size of {size} words, got {overlap}"
        )
    return [passage for document in documents for passage in _passages(document, size, overlap)]


def parse_size(size: str | int) -> str | int:
    """Checks a chunk size; digits (as a flag delivers them) become an int."""
    if isinstance(size, str) and size.isdecimal():
        size = int(size)
    if isinstance(size, int):
        if size < 1:
            raise UserError(f"chunk size must be at least 1 word, got {size}")
    elif size not in SIZES:
        raise UserError(
            f"unknown chunk size '{size}': a number of words, 'sentence' or 'document'. {nearest(size, SIZES)}"
        )
    return size


def deduplicate(passages: Sequence[Passage]) -> tuple[tuple[Passage, ...], dict[str, str]]:
    """Returns the passages without repeated texts (the first stays), and for every id the id that
    stands for its text."""
    first: dict[str, Passage] = {}
    kept = {passage.id: first.setdefault(passage.text, passage).id for passage in passages}
    return tuple(first.values()), kept


@dataclasses.dataclass(frozen=True)
class _Part:
    """A sentence or a line, or a piece of one. `text` begins with the white space that joins it to
    the part before."""

    text: str
    n_words: int
    start: int
    end: int
    block: Block


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A passage to be: its text, the headings above it, and its span in the document's text."""

    text: str
    heading: tuple[str, ...]
    start: int
    end: int


def _passages(document: Document, size: str | int | None, overlap: int) -> Iterator[Passage]:
    pieces = list(_pieces(document, size, overlap))
    for k, (piece, source) in enumerate(zip(pieces, _sources(document, pieces), strict=True)):
        yield Passage(f"{document.id}#{k}", _titled(document.title, piece), document.id, source)


def _titled(title: str, piece: _Piece) -> str:
    """Puts the path of headings in front of a piece, and the title unless something names it."""
    text = piece.text
    if not piece.heading and title.lower() in text.lower():
        return text
    path = " > ".join(
        filter(None, piece.heading if title in piece.heading else (title, *piece.heading))
    )
    if not text:
        return path
    return f"{path}:{'' if text.startswith(chr(10)) else ' '}{text}"


def _pieces(document: Document, size: str | int | None, overlap: int) -> Iterator[_Piece]:
    text = document.text
    begin = (
        len(document.title) + 1 if document.title and text.startswith(f"{document.title}\n") else 0
    )
    is_markdown = document.format == MARKDOWN
    if size is None and not is_markdown:
        size = CHUNK_WORDS if has_more_words(text, SHORT_WORDS) else "document"
    if size == "document":
        start, end = trim(text, begin, len(text)) or (begin, begin)
        yield _Piece(text[start:end], (), start, end)
        return
    found = blocks(text) if is_markdown else [Block(begin, len(text))]
    for heading, section in itertools.groupby(found, key=lambda block: block.heading):
        yield from (
            _piece(parts, heading) for parts in _sections(text, list(section), size, overlap)
        )


def _sections(
    text: str, section: Sequence[Block], size: str | int | None, overlap: int
) -> Iterator[Sequence[_Part]]:
    """Yields the parts of each passage of a section."""
    if size == "sentence":
        for block in section:
            parts = list(_parts(text, block, CHUNK_WORDS if block.lines else LONGEST_SENTENCE))
            yield from _pack(parts, CHUNK_WORDS, 0) if block.lines else ([part] for part in parts)
        return
    if size is None:
        parts = [part for block in section for part in _parts(text, block, SHORT_WORDS)]
        if sum(part.n_words for part in parts) <= SHORT_WORDS:
            yield from [parts] if parts else []
            return
    words = CHUNK_WORDS if size is None else int(size)
    yield from _pack(
        [part for block in section for part in _parts(text, block, words)], words, overlap
    )


def _parts(text: str, block: Block, most: int) -> Iterator[_Part]:
    """Yields the sentences or the lines of a block, in pieces of at most `most` words."""
    if block.bare:
        yield _Part("", 0, block.start, block.end, block)
        return
    behind = -1  # the end of the part before
    for start, end in (
        _lines(text, block) if block.lines else sentence_spans(text, block.start, block.end)
    ):
        found = list(word_spans(text[start:end]))
        for first in range(0, len(found), most):
            a, b = start + found[first][0], start + found[min(first + most, len(found)) - 1][1]
            if block.lines:
                # The line with its indentation, behind the blank lines above it.
                lead = (
                    text[start : start + found[0][0]]
                    if first == 0
                    else text[start + found[first - 1][1] : a]
                )
                written = (lead if first else f"\n{lead}") + text[a:b]
                written = _unquoted_lines(written) if block.quoted and not first else written
            else:
                raw = _QUOTE_MARK.sub("", text[a:b]) if block.quoted else text[a:b]
                written = ("" if a == behind else " ") + " ".join(raw.split())
            behind = b
            yield _Part(written, min(most, len(found) - first), a, b, block)


def _unquoted_lines(text: str) -> str:
    return "\n".join(_CODE_QUOTE_MARK.sub("", line) for line in text.split("\n"))


def _lines(text: str, block: Block) -> Iterator[tuple[int, int]]:
    """Yields spans of the lines that are not blank, each with the blank lines above it."""
    start = at = block.start
    while at < block.end:
        end = text.find("\n", at, block.end)
        end = block.end if end < 0 else end
        if text[at:end].strip():
            yield start, end
            start = end + 1
        at = end + 1


def _pack(parts: Iterable[_Part], size: int, overlap: int) -> Iterator[Sequence[_Part]]:
    """Packs parts of at most `size` words greedily into pieces of at most `size` words."""
    current: collections.deque[_Part] = collections.deque()
    n_words = 0
    for part in parts:
        if current and n_words + part.n_words > size:
            yield list(current)
            while n_words > min(overlap, size - part.n_words):
                n_words -= current.popleft().n_words
        current.append(part)
        n_words += part.n_words
    if current:
        yield list(current)


def _piece(parts: Sequence[_Part], heading: tuple[str, ...]) -> _Piece:
    """Writes parts one behind the other, each run of lines between its opening and closing."""
    written: list[str] = []
    for block, run in itertools.groupby(parts, key=lambda part: part.block):
        texts = [part.text for part in run]
        if block.lines:
            opening, closing = (
                f"\n{line}" if line else "" for line in (block.opening, block.closing)
            )
            written += [opening, "\n", texts[0].lstrip("\n"), *texts[1:], closing, "\n"]
        else:
            written += [
                texts[0].lstrip() if written and written[-1] == "\n" else texts[0],
                *texts[1:],
            ]
    text = "".join(written)
    stripped = text.strip()
    kept = f"\n{stripped}" if heading and parts[0].block.lines else stripped
    return _Piece(kept, heading, parts[0].start, parts[-1].end)


def _sources(document: Document, pieces: Sequence[_Piece]) -> Iterator[Source | None]:
    """Yields the place of each piece in the document's file. Takes one pass over the text."""
    source, text, cuts = document.source, document.text, document.cuts or ()
    if source is None:
        yield from (None for _ in pieces)
        return
    at, told, place = 0, (0, 0, 0), {}
    for offset in sorted({offset for piece in pieces for offset in (piece.start, piece.end)}):
        n_bytes, n_lines, n_pages = told
        told = (
            n_bytes + len(text[at:offset].encode()),
            n_lines + text.count("\n", at, offset),
            n_pages + text.count("\f", at, offset),
        )
        place[offset], at = told, offset
    left_out = list(
        itertools.accumulate(
            cuts, lambda sums, cut: (sums[0] + cut.bytes, sums[1] + cut.lines), initial=(0, 0)
        )
    )

    def in_file(offset: int, n_cuts: int) -> tuple[int, int]:
        return place[offset][0] + left_out[n_cuts][0], place[offset][1] + left_out[n_cuts][1]

    for piece in pieces:
        if document.cuts is None:
            page = 1 + place[piece.start][2] if document.format == PAGES else source.page
            yield dataclasses.replace(source, heading=piece.heading, page=page)
            continue
        # What was left out right in front of a piece, or right behind it, is no part of it.
        first = in_file(piece.start, bisect.bisect_right(cuts, piece.start, key=lambda cut: cut.at))
        last = in_file(piece.end, bisect.bisect_left(cuts, piece.end, key=lambda cut: cut.at))
        yield dataclasses.replace(
            source,
            heading=piece.heading,
            bytes=(first[0], last[0]),
            lines=(first[1] + 1, last[1] + 1),
        )
