"""Markdown as blocks: what stands under which headings, which lines stay lines, and what is no text
of the document.

markdown-it-py finds the blocks (CommonMark and tables); the text within them stays as it is
written.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator

from markdown_it import MarkdownIt
from markdown_it.token import Token

from kafjax.core.records import Cut

MARKDOWN = "markdown"
_LONGEST_HEADING = 120
# What looks like front matter, and not like a rule between two paragraphs: a line of `key: value`
# follows.
_FRONT = re.compile(r"(---|\+\+\+)[ \t]*\r?\n(?=[\w\"'#-][^\n]*[:=]|#|\1)")
_TITLE = re.compile(r"""^title[ \t]*[:=][ \t]*(["']?)(.+?)\1[ \t]*\r?$""", re.MULTILINE)
_LINK = re.compile(r"!?\[([^\[\]]*)\]\([^()]*\)")
_ANCHOR = re.compile(r"\s*\{#[^{}]*\}$")
_LINE_END = re.compile(r"\r\n|\n|\r")


@dataclasses.dataclass(frozen=True)
class Block:
    """A part of a text, from `start` to `end`, under `heading`.

    Its `lines` stay lines in code and tables. `opening` and `closing` stand around whatever part of
    them a passage holds: the fence of code, the head of a table. `quoted` lines begin with ">". A
    `bare` block is a heading with nothing under it.
    """

    start: int
    end: int
    heading: tuple[str, ...] = ()
    lines: bool = False
    opening: str = ""
    closing: str = ""
    quoted: bool = False
    bare: bool = False


def clean(text: str) -> tuple[str, str, tuple[Cut, ...]]:
    """Leaves out front matter and comments, but not the comments that code shows.

    Returns the text, the title that front matter gives ("" for none), and what was left out.
    """
    front = _front_matter(text)
    title = _TITLE.search(text, 0, front)
    spans = [(0, front)] if front else []
    starts = _line_starts(text, front)
    for token in _leaves(_parser().parse(text[front:])):
        if token.type not in ("fence", "code_block") and token.map:
            spans += _comments(text, starts[token.map[0]], starts[token.map[1]])
    kept, cuts, at, size = [], [], 0, 0
    for start, end in spans:
        kept.append(text[at:start])
        size += start - at
        cuts.append(Cut(size, len(text[start:end].encode()), text.count("\n", start, end)))
        at = end
    return "".join([*kept, text[at:]]), title[2] if title else "", tuple(cuts)


def blocks(text: str) -> list[Block]:
    """Finds the blocks of a text, in their order."""
    starts = _line_starts(text, 0)
    found: list[Block] = []
    path: list[tuple[int, str]] = []
    empty: Block | None = None  # the heading with nothing under it yet
    tokens = _parser().parse(text)
    quotes = 0
    for index, token in enumerate(tokens):
        quotes += {"blockquote_open": 1, "blockquote_close": -1}.get(token.type, 0)
        if token.type == "heading_open" and token.level == 0 and token.map:
            level, name = int(token.tag[1:]), _name(tokens[index + 1].content)
            if empty is not None and level <= path[-1][0]:
                found.append(empty)
            path = [*((above, title) for above, title in path if above < level), (level, name)]
            empty = Block(starts[token.map[0]], starts[token.map[1]], _titles(path), bare=True)
        elif (block := _block(token, text, starts, _titles(path), quotes > 0)) is not None:
            found.append(block)
            empty = None
    return found if empty is None else [*found, empty]


def _block(
    token: Token, text: str, starts: list[int], heading: tuple[str, ...], quoted: bool
) -> Block | None:
    """Makes the block of a token that holds text; None for the others."""
    if token.map is None or token.type not in (
        "paragraph_open",
        "heading_open",
        "html_block",
        "table_open",
        "fence",
        "code_block",
    ):
        return None
    first, behind = token.map
    if token.type == "fence":
        marks = token.markup
        closed = (
            first + 1 < behind
            and text[starts[behind - 1] : starts[behind]].strip().lstrip("> ") == marks
        )
        return Block(
            starts[first + 1],
            starts[behind - closed],
            heading,
            True,
            f"{marks}{token.info.strip()}",
            marks,
            quoted,
        )
    if token.type == "code_block":
        marks = "`" * (1 + max(map(len, re.findall(r"`{2,}", token.content)), default=2))
        return Block(starts[first], starts[behind], heading, True, marks, marks, quoted)
    if token.type == "table_open":
        head = first + 2 if first + 2 < behind else first
        return Block(
            starts[head],
            starts[behind],
            heading,
            True,
            text[starts[first] : starts[head]].strip(),
            "",
            quoted,
        )
    return Block(starts[first], starts[behind], heading, quoted=quoted)


@functools.cache
def _parser() -> MarkdownIt:
    """CommonMark's blocks, and tables. What stands within a block is not parsed, nor are
    definitions of links taken out."""
    parser = MarkdownIt("commonmark").enable("table").disable("reference")
    parser.core.ruler.disable(["inline", "text_join"], True)
    return parser


def _leaves(tokens: list[Token]) -> Iterator[Token]:
    return (
        token
        for token in tokens
        if token.type in ("paragraph_open", "heading_open", "html_block", "table_open")
    )


def _line_starts(text: str, begin: int) -> list[int]:
    """Places where lines begin from `begin` on, as markdown-it counts them, and the end of the text
    (twice, if it has no last line end)."""
    return [begin, *(match.end() for match in _LINE_END.finditer(text, begin)), len(text)]


def _front_matter(text: str) -> int:
    """Length of the front matter, in YAML or TOML. 0 where there is none."""
    if (opening := _FRONT.match(text)) is None:
        return 0
    closing = re.compile(
        rf"^(?:{re.escape(opening[1])}|\.\.\.)[ \t]*\r?(?:\n|\Z)", re.MULTILINE
    ).search(text, opening.end())
    return closing.end() if closing else 0


def _comments(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yields spans of comments, but for those that inline code shows. One that does not end is
    text."""
    ticks, at = 0, start
    while (begin := text.find("<!--", at, end)) >= 0 and (
        close := text.find("-->", begin + 4, end)
    ) >= 0:
        ticks += text.count("`", at, begin)
        if ticks % 2:
            at = begin + 4
        else:
            yield begin, close + 3
            at = close + 3


def _name(content: str) -> str:
    name = " ".join(_ANCHOR.sub("", _LINK.sub(r"\1", content)).split())
    return name if len(name) <= _LONGEST_HEADING else f"{name[:_LONGEST_HEADING]}..."


def _titles(path: list[tuple[int, str]]) -> tuple[str, ...]:
    return tuple(title for _, title in path if title)
