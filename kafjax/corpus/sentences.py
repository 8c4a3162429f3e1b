"""Sentences of prose in any script, as places in the text. Time is linear in the text, whatever it
holds."""

from __future__ import annotations

import re
from collections.abc import Iterator

import regex

from kafjax.core.words import UNSPACED

# A full stop after a title (or "e.g.") ends no sentence; after another abbreviation, an initial or
# a dotted acronym ("the U.S.") it does only before a word that rarely stands there within a
# sentence; "No." and its like belong to the number that follows.
_TITLES = frozenset(
    "e.g i.e a.k.a mr mrs ms dr prof rev hon gov gen capt lt sgt maj cmdr adm sen st mt messrs mme mlle".split()
)
_ABBREVIATIONS = frozenset(
    "jr sr esq vs cf al approx ca est eds inc ltd co corp bros dept univ assn ave blvd rd ft "
    "jan feb apr jun jul aug sep sept oct nov dec".split()
)
_NUMBERED = frozenset(
    "no nos p pp vol vols fig figs eq eqs ch sec art nr nrn abb bd bde kap abs tab ziff".split()
)
# German abbreviations in the middle of a sentence, in their own case: "Phil." is a name, "phil." is
# not. Nouns are capitals there, so the word behind tells nothing.
_WITHIN = frozenset(
    "bzw vgl sog bspw Hr Hrn Fr Dipl Ing med phil jur rer nat habil geb gest ehem inkl exkl zzgl evtl ggf ca "
    "dt engl frz lat griech Okt Dez Mrz J\u00e4n Mio Mrd Std".split()
)
# Nouns that follow an ordinal, "am 3. Oktober", where English would end a sentence.
_ORDERED = frozenset(
    "januar j\u00e4nner februar m\u00e4rz april mai juni juli august september oktober november dezember "
    "jan feb m\u00e4r apr jun jul aug sep sept okt nov dez jahrhundert jahrhunderts jh jahrtausend jahrtausends "
    "weltkrieg weltkriegs weltkrieges auflage kapitel band klasse platz stock etage geburtstag jahrestag "
    "lebensjahr tag woche spieltag runde bezirk armee division dynastie legislaturperiode".split()
)
_OPENERS = frozenset(
    "the an this that these those it its he she they we you his her their our in on at by for from with when while where if "
    "although but and however there since after before as some many most all no one two".split()
)
_OPEN, _CLOSE = "\"'\u201c\u201e\u2018\u00ab\u00bf\u00a1(\\[", "\"'\u201d\u201c\u2019\u00bb)\\]"
# Stops of Latin, Greek and Cyrillic, and of Arabic's and others' text that is typed with them: they
# need a blank behind.
_SPACED_STOPS = ".!?\u2026\u203c\u203d\u2047\u2048\u2049"
_END = regex.compile(
    # Japanese and Chinese quote whole sentences within one: what stands in a short pair of brackets
    # is passed over.
    r"(?P<quoted>[\u300c\u300e\uff08][^\u300c\u300d\u300e\u300f\uff08\uff09\n]{0,200}+[\u300d\u300f\uff09])"
    # A run of marks is looked at once, from its first one: else long rows of dots take quadratic time.
    rf"|(?<![{_SPACED_STOPS}])(?P<stop>[{_SPACED_STOPS}]++)[{_CLOSE}]*+\s++(?=[{_OPEN}]*+(?P<next>\w))"
    # Stops of other scripts (the full-width ones, danda, the Arabic question mark, ...) need no blank behind them.
    # A Latin bracket behind one that touches a Latin word belongs to that word.
    rf"|(?P<sure>[\p{{Sentence_Terminal}}--[{_SPACED_STOPS}\uff0e]]++|(?<!\d)\uff0e|\uff0e(?!\d))"
    rf"(?:[\u300d\u300f\uff09]|[{_CLOSE}]++(?=\s|\Z|[{UNSPACED}]))*+\s*+"
    # Thai and Lao have no stops: blanks stand between clauses, and around names and numbers.
    r"|(?<=[\p{Thai}\p{Lao}])(?P<gap>\s++)(?=[\p{Thai}\p{Lao}])",
    regex.V1,
)
_QUOTED_STOP = regex.compile(r"[\p{Sentence_Terminal}--[.]][\u300d\u300f\uff09]+$", regex.V1)
# What goes on after a quotation: "..., he said" and the particles that quote.
_GOES_ON = "\u3068\u306e\u3001\uff0c\uff1a\u3063\u304c\u306f\u3092\u306b"
# letters of Thai or Lao before a blank that ends a sentence, so that a name is not cut in two
_LEAST_CLAUSE = 25
_LAST_TOKEN = re.compile(rf"[^\s{_OPEN}]+$")
_HEADING = re.compile(r"#{1,6}\s")
_ITEM = re.compile(r"\s*(?:#{1,6}|[-*\u2022]|\d{1,9}[.)])(?:\s|$)")
_NUMBER = re.compile(r"\s*\d{1,3}")
_LINE = regex.compile(r"[^\n]*+\n?")


def sentences(text: str) -> list[str]:
    """Splits prose into sentences, whitespace normalised.

    A stop ends no sentence after a title ("Dr."), an initial ("J. K. Rowling"), a German
    abbreviation or ordinal ("z. B.", "am 3. Oktober"), inside a number (3.14), or before a
    lower-case word; blank lines, headings and list items always end one. Thai
    and Lao, which have no stops, end one at a blank between two of their letters, 25 letters after
    the last end. Text without any stop is one sentence; no text is none.
    """
    return [" ".join(text[start:end].split()) for start, end in sentence_spans(text)]


def sentence_spans(text: str, start: int = 0, end: int | None = None) -> list[tuple[int, int]]:
    """Finds (start, end) of each sentence between `start` and `end`, without white space around
    it."""
    return [
        trimmed
        for paragraph in _paragraphs(text, start, len(text) if end is None else end)
        for sentence in _split(text, *paragraph)
        if (trimmed := trim(text, *sentence))
    ]


def trim(text: str, start: int, end: int) -> tuple[int, int] | None:
    """Narrows a span to leave out white space at both ends. None where nothing else is in it."""
    piece = text[start:end]
    body = piece.lstrip()
    return (start + len(piece) - len(body), start + len(piece.rstrip())) if body else None


def _paragraphs(text: str, first: int, behind: int) -> Iterator[tuple[int, int]]:
    """Yields spans of paragraphs. They end at blank lines; headings and list items are paragraphs
    of their own."""
    began: int | None = None
    for match in _LINE.finditer(text, first, behind):
        line, start, end = match[0], match.start(), match.end()
        heading = _HEADING.match(line)
        if began is not None and (not line.strip() or _ITEM.match(line)):
            yield began, start
            began = None
        if heading:
            yield start, end
        elif began is None and line.strip():
            began = start
    if began is not None:
        yield began, behind


def _split(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    first = start
    for match in _END.finditer(text, start, end):
        if match["stop"]:
            stop, after = match.start("stop"), match.start("next")
            if stop - start <= 9 and _NUMBER.fullmatch(text, start, stop) and start == first:
                continue  # the number of a list item
            ends = _ends_sentence(
                text[max(start, stop - 40) : stop],
                match["stop"],
                text[after : min(after + 40, end)],
            )
        elif match["quoted"]:
            ends = (
                bool(_QUOTED_STOP.search(match[0][-8:]))
                and match.end() < end
                and text[match.end()] not in _GOES_ON
            )
        else:
            ends = bool(match["sure"]) or match.start() - start >= _LEAST_CLAUSE
        if ends:
            yield start, match.end()
            start = match.end()
    yield start, end


def _ends_sentence(before: str, stop: str, after: str) -> bool:
    if after[0].islower():
        return False
    if stop != ".":
        return True
    token = _LAST_TOKEN.search(before)
    written = token[0] if token else ""
    word, following = written.lower(), re.match(r"\w+", after)
    if word in _TITLES or written in _WITHIN:
        return False
    if word in _NUMBERED:
        return not after[0].isdigit()
    if word.isdigit() and len(word) <= 2:
        return following is None or following[0].lower() not in _ORDERED
    dotted = "." in word and word.replace(".", "").isalpha()
    if word in _ABBREVIATIONS or dotted or (len(word) == 1 and word.isalpha()):
        return following is not None and following[0].lower() in _OPENERS
    return True
