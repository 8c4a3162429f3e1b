"""Text to tokens: the only module that decides what surrounds a text, what is a control token, and
how a text continues.

    front(tokenizer)                  [BOS], or nothing: the tokens that the tokenizer's template puts before a text
    content(tokenizer, "a <eos> b")   the letters of "<eos>", never the control token
    continued(tokenizer, "Answer:", " 1912")   the tokens that follow those of "Answer:" in "Answer: 1912"
    prompt_ids(tokenizer, prompt)     a prompt from its first token on: front and content, or what a chat template makes of turns

A template that also ends texts (`add_eos_token`) would put an EOS between prompt and answer, and
two behind a training text. Its ending is therefore never used: training adds one EOS, and
generation adds none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Generator, Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer

from kafjax.core.errors import UserError

_ANCHORS = ("\n", ".", "a")


@dataclasses.dataclass(frozen=True)
class Marked:
    """A text of alternating markup and content. It begins and ends with markup, which may be empty.

    The name of a control token is the token itself in markup, which a chat template writes, and
    plain letters in content, which a user writes. Nothing is put in front: a chat template writes
    its own BOS.
    """

    parts: tuple[str, ...]

    def __add__(self, other: Marked) -> Marked:
        return Marked((*self.parts[:-1], self.parts[-1] + other.parts[0], *other.parts[1:]))

    def __str__(self) -> str:
        return "".join(self.parts)

    @property
    def contents(self) -> list[tuple[int, int]]:
        """Spans (begin, end) of each content in the whole text."""
        ends = [0, *itertools.accumulate(map(len, self.parts))]
        return [(ends[i], ends[i + 1]) for i in range(1, len(self.parts), 2)]


Prompt = str | Marked
"""A question to a model: plain text, or turns of a chat."""


def front(tokenizer: Tokenizer) -> list[int]:
    """Returns the ids that the tokenizer's template puts before a text, mostly `[BOS]`; empty where
    it puts none."""
    encoding = tokenizer.encode("a")
    marks = encoding.special_tokens_mask
    first = next((i for i, mark in enumerate(marks) if not mark), len(marks))
    return encoding.ids[:first]


def content(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encodes a text as plain text: the name of a control token in it, such as `<eos>`, is encoded
    letter by letter."""
    with _letters(tokenizer):
        return tokenizer.encode(text, add_special_tokens=False).ids


def contents(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Encodes many texts as `content` does, on all cores."""
    with _letters(tokenizer):
        return [
            encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)
        ]


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Encodes a prompt that begins a sequence: behind `front` if it is plain text, as it stands if
    it is marked."""
    return (
        _ids(tokenizer, prompt)
        if isinstance(prompt, Marked)
        else [*front(tokenizer), *content(tokenizer, prompt)]
    )


def continued(tokenizer: Tokenizer, before: Prompt, text: Prompt) -> list[int]:
    """Encodes `text` as the continuation of `before`, so that the ids of both in a row spell both.
    Both have one type.

    Some tokenizers put a space before each text, and would put one between the two. So the whole is
    encoded, and the ids after those of `before` are returned. Where a token spans the seam, `text`
    is encoded behind another text that it does not join.
    """
    for anchor in (before, *_ANCHORS):
        # of the type of `text`
        start: Any = (
            Marked((anchor,)) if isinstance(text, Marked) and isinstance(anchor, str) else anchor
        )
        first, whole = _ids(tokenizer, start), _ids(tokenizer, start + text)
        if whole[: len(first)] == first:
            return whole[len(first) :]
    return _ids(tokenizer, text)


def _ids(tokenizer: Tokenizer, text: Prompt) -> list[int]:
    return _marked_ids(tokenizer, text) if isinstance(text, Marked) else content(tokenizer, text)


def _marked_ids(tokenizer: Tokenizer, text: Marked) -> list[int]:
    """Encodes the whole, then spells out control tokens that were found inside content."""
    whole, spans = str(text), text.contents
    added = _added_tokens(tokenizer, tokenizer.get_vocab_size())
    markup = "\n".join(text.parts[::2])
    control = {
        id
        for id, token in added.items()
        if token.special or (token.content.strip() and token.content in markup)
    }
    encoding = tokenizer.encode(whole, add_special_tokens=False)
    ids: list[int] = []
    for id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
        if id in control and any(start < to and at < end for at, to in spans):
            # A name that is not special would be read as one token even among letters, but not its
            # halves.
            middle = end if added[id].special else start + (end - start) // 2
            ids += [
                letter
                for part in (whole[start:middle], whole[middle:end])
                if part
                for letter in continued(tokenizer, "\n", part)
            ]
        else:
            ids.append(id)
    return ids


@dataclasses.dataclass(frozen=True)
class Foreign:
    """Tokens of a tokenizer beyond its model's vocabulary: `ids` by their spelling. Looked up once,
    for many texts."""

    ids: Mapping[str, int]
    vocab_size: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocab_size: int) -> Foreign:
        added = _added_tokens(tokenizer, tokenizer.get_vocab_size())
        return cls(
            {
                token.content: id
                for id, token in added.items()
                if id >= vocab_size and token.content
            },
            vocab_size,
        )

    def refuse(self, text: str, source: str) -> None:
        """Refuses a text that holds the name of such a token.

        Raises:
          UserError: naming `source` and the token.
        """
        for content, id in self.ids.items():
            if content in text:
                raise UserError(
                    f"{source} holds '{content}', token {id} of the tokenizer, which the model's vocabulary of {self.vocab_size} has not; "
                    "take it out of the text"
                )


def check_ids(ids: list[int], vocab_size: int, source: str) -> None:
    """Refuses tokens beyond a vocabulary, for which a lookup would silently read the last row of
    the embedding.

    Raises:
      UserError: naming `source` and the token.
    """
    if ids and (highest := max(ids)) >= vocab_size:
        raise UserError(
            f"{source}: the tokenizer is not this model's: token {highest} of a vocabulary of {vocab_size}"
        )


@functools.lru_cache(8)
def _added_tokens(tokenizer: Tokenizer, n_tokens: int) -> dict[int, AddedToken]:
    """The tokens that were added to a tokenizer, by id: a copy that the library makes anew each
    time, 12 ms for Gemma's thousands."""
    return tokenizer.get_added_tokens_decoder()


@contextlib.contextmanager
def _letters(tokenizer: Tokenizer) -> Generator[None]:
    """Encodes control tokens as letters within the block."""
    before = tokenizer.encode_special_tokens
    if not before:
        tokenizer.encode_special_tokens = True
    try:
        yield
    finally:
        if not before:
            tokenizer.encode_special_tokens = False
