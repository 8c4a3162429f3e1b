"""Chunking of documents into passages: sentences, packed words, or whole documents. No duplicates within a corpus."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from kafjax.core.errors import UserError, nearest
from kafjax.core.records import Document, Passage

SIZES = ("sentence", "document")

# A full stop after a title (or "e.g.") ends no sentence; after another abbreviation, an initial or a dotted acronym ("the U.S.") it
# does only before a word that rarely stands there within a sentence; "No." and its like belong to the number that follows.
_TITLES = frozenset("e.g i.e a.k.a mr mrs ms dr prof rev hon gov gen capt lt sgt maj cmdr adm sen st mt messrs mme mlle".split())
_ABBREVIATIONS = frozenset(
    "jr sr esq vs cf al approx ca est eds inc ltd co corp bros dept univ assn ave blvd rd ft "
    "jan feb apr jun jul aug sep sept oct nov dec".split()
)
_NUMBERED = frozenset("no nos p pp vol vols fig figs eq eqs ch sec art".split())
_OPENERS = frozenset(
    "the an this that these those it its he she they we you his her their our in on at by for from with when while where if "
    "although but and however there since after before as some many most all no one two".split()
)
# Quotes, brackets and the full-width stops of Chinese and Japanese, which need no space after them.
_OPEN, _CLOSE = "\"'\u201c\u2018\u00ab(\\[", "\"'\u201d\u2019\u00bb)\\]"
_END = re.compile(
    # A run of marks is looked at once, from its first one: else long rows of dots take quadratic time.
    rf"(?<![.!?\u2026])(?P<stop>[.!?\u2026]++)[{_CLOSE}]*+\s++(?=[{_OPEN}]*(?P<next>\w))|(?P<wide>[\u3002\uff01\uff1f]+[\u300d\u300f\u201d\uff09]*)\s*"
)
# Thai, Lao, Burmese, Khmer; kana; Chinese characters and their extensions; full-width forms.
_WIDE = "\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff\u3001-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\uff01-\uff9f\U00020000-\U0003ffff"
_UNIT, _LONG = re.compile(rf"[{_WIDE}]|[^{_WIDE}]+"), re.compile(r".{1,12}", re.DOTALL)
_LAST_TOKEN = re.compile(rf"[^\s{_OPEN}]+$")
# Paragraphs end at blank lines; headings and list items are lines of their own.
_PARAGRAPH = re.compile(r"\n\s*\n|\n(?=\s*(?:#{1,6}|[-*•]|\d+[.)])\s)|(?<=\n)(?=#{1,6}\s)")
_HEADING_LINE = re.compile(r"^(#{1,6}\s[^\n]*)\n", re.MULTILINE)


def sentences(text: str) -> list[str]:
    """Splits prose into sentences, whitespace normalised.

    A stop ends no sentence after a title ("Dr."), an initial ("J. K. Rowling"), inside a number (3.14), or before a lower-case word;
    blank lines, headings and list items always end one. Text without any stop is one sentence; no text is none.
    """
    paragraphs = _PARAGRAPH.split(_HEADING_LINE.sub(r"\1\n\n", text.replace("\r\n", "\n")))
    return [sentence for paragraph in paragraphs for sentence in _split(" ".join(paragraph.split()))]


def _split(paragraph: str) -> list[str]:
    found, start = [], 0
    for match in _END.finditer(paragraph):
        stop, after = match.start("stop"), match.start("next")
        if match["wide"] or _ends_sentence(paragraph[max(start, stop - 40) : stop], match["stop"], paragraph[after : after + 40]):
            found.append(paragraph[start : match.end()].strip())
            start = match.end()
    return [*found, *filter(None, [paragraph[start:].strip()])]


def _ends_sentence(before: str, stop: str, after: str) -> bool:
    if after[0].islower():
        return False
    if stop != ".":
        return True
    token = _LAST_TOKEN.search(before)
    word = token[0].lower() if token else ""
    if word in _TITLES:
        return False
    if word in _NUMBERED:
        return not after[0].isdigit()
    dotted = "." in word and word.replace(".", "").isalpha()
    if word in _ABBREVIATIONS or dotted or (len(word) == 1 and word.isalpha()):
        following = re.match(r"\w+", after)
        return following is not None and following[0].lower() in _OPENERS
    return True


def chunk(documents: Iterable[Document], size: str | int = "sentence", overlap: int = 0) -> tuple[Passage, ...]:
    """Cuts documents into passages; of passages with the same text the first is kept.

    `size` is "sentence", "document", or a number of words: whole sentences are then packed up to that many, with up to
    `overlap` words of whole sentences repeated from the passage before; a longer sentence is cut between words. Ids are
    "{document.id}#0", "#1" and so on. A passage that does not name its document's title is prefixed by it, since a passage is read alone.
    Raises `UserError` on an unknown size or an overlap that is not smaller than it.
    """
    return deduplicate(cut(documents, size, overlap))[0]


def cut(documents: Iterable[Document], size: str | int = "sentence", overlap: int = 0) -> list[Passage]:
    """Cuts documents as `chunk` does, but keeps duplicates."""
    size = parse_size(size)
    if not isinstance(size, int) and overlap:
        raise UserError(f"an overlap of {overlap} words needs a chunk size in words, not '{size}'")
    if isinstance(size, int) and not 0 <= overlap < size:
        raise UserError(f"overlap must be at least 0 and less than the chunk size of {size} words, got {overlap}")
    return [
        Passage(id=f"{document.id}#{k}", text=_titled(document.title, piece), document=document.id)
        for document in documents
        for k, piece in enumerate(_pieces(document, size, overlap))
    ]


def parse_size(size: str | int) -> str | int:
    """Checks a chunk size; digits (as a flag delivers them) become an int."""
    if isinstance(size, str) and size.isdecimal():
        size = int(size)
    if isinstance(size, int):
        if size < 1:
            raise UserError(f"chunk size must be at least 1 word, got {size}")
    elif size not in SIZES:
        raise UserError(f"unknown chunk size '{size}': a number of words, 'sentence' or 'document'. {nearest(size, SIZES)}")
    return size


def deduplicate(passages: Sequence[Passage]) -> tuple[tuple[Passage, ...], dict[str, str]]:
    """Returns the passages without repeated texts (the first stays), and for every id the id that stands for its text."""
    first: dict[str, Passage] = {}
    kept = {passage.id: first.setdefault(passage.text, passage).id for passage in passages}
    return tuple(first.values()), kept


def _pieces(document: Document, size: str | int, overlap: int) -> list[str]:
    body = document.text
    if document.title and body.startswith(f"{document.title}\n"):
        body = body[len(document.title) + 1 :]
    if size == "document":
        return [body.strip()]
    if size == "sentence":
        return sentences(body)
    return _pack([part for sentence in sentences(body) for part in _at_most(words(sentence), int(size))], int(size), overlap)


def words(text: str) -> list[str]:
    """Splits a text into words, each with a space before it where one stood; joined they are the text, white space normalised.

    Scripts without spaces (Chinese, Japanese, Thai, ...) count a word for each letter, and an unbroken run of over 48 characters, such
    as a long address, one for each 12: about as many as an encoder has tokens for them.
    """
    found: list[str] = []
    for run in text.split():
        pieces = _UNIT.findall(run)
        pieces = [part for piece in pieces for part in (_LONG.findall(piece) if len(piece) > 48 else [piece])]
        found += [f" {pieces[0]}", *pieces[1:]]
    return found


def _at_most(words: list[str], size: int) -> list[list[str]]:
    return [words[start : start + size] for start in range(0, len(words), size)]


def _pack(parts: list[list[str]], size: int, overlap: int) -> list[str]:
    """Packs sentences (lists of at most `size` words) greedily into pieces of at most `size` words."""
    pieces: list[list[list[str]]] = []
    current: list[list[str]] = []
    for part in parts:
        if current and _words(current) + len(part) > size:
            pieces.append(current)
            current = _tail(current, min(overlap, size - len(part)))
        current = [*current, part]
    if current:
        pieces.append(current)
    return ["".join(word for part in piece for word in part).strip() for piece in pieces]


def _tail(parts: list[list[str]], limit: int) -> list[list[str]]:
    """The last parts that together hold at most `limit` words."""
    while _words(parts) > limit:
        parts = parts[1:]
    return parts


def _words(parts: list[list[str]]) -> int:
    return sum(map(len, parts))


def _titled(title: str, text: str) -> str:
    return text if title.lower() in text.lower() else f"{title}: {text}"
