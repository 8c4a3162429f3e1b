"""Settings of generation, with their only defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from kafjax.core.config import Config, option
from kafjax.generation.batching import BATCH_TOKENS

SHORTEST_LIMIT, LONGEST_LIMIT = 12, 128
"""Bounds of a limit that nobody chose. A question that is asked alone gets the upper one."""


def limit_for(lengths: Iterable[int]) -> int:
    """Chooses a limit for answers of `lengths` tokens: models put them into other words, and what
    ends a reply comes on top."""
    return min(max(SHORTEST_LIMIT, max(lengths, default=0) + 4), LONGEST_LIMIT)


@dataclasses.dataclass(frozen=True)
class GenerationConfig(Config):
    """Limits on the length of answers and on the questions answered at a time."""

    max_new_tokens: int | None = option(
        None,
        "Generation: longest answer in tokens (default: room for the corpus's longest accepted answer, 12 at least).",
        least=1,
        most=2**20,
    )
    hyde_tokens: int = option(
        24,
        "hyde and rewrite: longest passage, or query, that the model makes up, in tokens.",
        least=1,
        most=2**20,
    )
    batch: int = option(32, "Generation: questions answered at a time.", least=1, most=2**16)
    batch_tokens: int = option(
        BATCH_TOKENS,
        "Generation: tokens of the prompts that are read at a time, padding included. Fewer need less memory.",
        least=1,
        identity=False,
    )

    @property
    def limit(self) -> int:
        """The longest answer in tokens."""
        return SHORTEST_LIMIT if self.max_new_tokens is None else self.max_new_tokens
