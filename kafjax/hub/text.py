"""Text to tokens: the one place that says what stands around a text, what a control token is, and where a text goes on.

    front(tokenizer)                  [BOS], or nothing: what the tokenizer's own template puts before a text
    content(tokenizer, "a <eos> b")   the letters of "<eos>", never the control token
    continued(tokenizer, "Answer:", " 1912")   the tokens that follow those of "Answer:" in "Answer: 1912"

A template that also ends texts (`add_eos_token`) would put an EOS between prompt and answer and twice behind a training text, so what
it puts behind is never used: whoever trains adds one EOS, whoever asks adds none.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping

from tokenizers import Tokenizer

from kafjax.core.errors import UserError

_ANCHORS = ("\n", ".", "a")


def front(tokenizer: Tokenizer) -> list[int]:
    """Returns the ids that the tokenizer's template puts before a text, mostly `[BOS]`; empty where it puts none."""
    encoding = tokenizer.encode("a")
    marks = encoding.special_tokens_mask
    first = next((i for i, mark in enumerate(marks) if not mark), len(marks))
    return encoding.ids[:first]


def content(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encodes a text as text. The name of a control token that it holds, such as `<eos>`, is letters."""
    with _letters(tokenizer):
        return tokenizer.encode(text, add_special_tokens=False).ids


def contents(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Encodes many texts as `content` does, on all cores."""
    with _letters(tokenizer):
        return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


def continued(tokenizer: Tokenizer, before: str, text: str) -> list[int]:
    """Encodes `text` as it goes on behind `before`, so that `content(before) + continued(before, text)` spells both.

    Tokenizers that put a space before each text they are given would put one between the two. The whole is encoded, and what
    follows the tokens of `before` is the answer. Where the whole is divided otherwise, since a token reaches over the seam, `text`
    is encoded behind something else that it does not join.
    """
    for anchor in (before, *_ANCHORS):
        first, whole = content(tokenizer, anchor), content(tokenizer, anchor + text)
        if whole[: len(first)] == first:
            return whole[len(first) :]
    return content(tokenizer, text)


@dataclasses.dataclass(frozen=True)
class Foreign:
    """The tokens that a tokenizer has and its model has not: `ids` by what spells them. Looked up once, for many texts."""

    ids: Mapping[str, int]
    vocab_size: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocab_size: int) -> Foreign:
        added = tokenizer.get_added_tokens_decoder()
        return cls({token.content: id for id, token in added.items() if id >= vocab_size and token.content}, vocab_size)

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
    """Refuses tokens beyond a vocabulary: a lookup would read the last row of the embedding instead, without a word.

    Raises:
      UserError: naming `source` and the token.
    """
    if ids and (highest := max(ids)) >= vocab_size:
        raise UserError(f"{source}: the tokenizer is not this model's: token {highest} of a vocabulary of {vocab_size}")


@contextlib.contextmanager
def _letters(tokenizer: Tokenizer) -> Iterator[None]:
    """Has control tokens read as letters within the block."""
    before = tokenizer.encode_special_tokens
    if not before:
        tokenizer.encode_special_tokens = True
    try:
        yield
    finally:
        if not before:
            tokenizer.encode_special_tokens = False
