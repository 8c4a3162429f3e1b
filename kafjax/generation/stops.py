"""Ends of replies: the EOS token, or a stop string, which may be spread over several tokens."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Stops:
    """EOS and the stop strings of one tokenizer.

    Attributes:
      strings: none of them appears in a reply's text.
      tokens: ids that end a reply by themselves: EOS, and every token whose own text holds a stop
        string.
      mask_V: the same for the device, bool `[V]`.
    """

    tokenizer: Tokenizer
    eos_ids: tuple[int, ...]
    strings: tuple[str, ...]
    tokens: frozenset[int]
    mask_V: jax.Array

    @classmethod
    def of(
        cls, tokenizer: Tokenizer, strings: tuple[str, ...], vocab_size: int, *eos_ids: int
    ) -> Stops:
        """Finds the stop tokens of a tokenizer. It looks through the whole vocabulary: about a
        second for a large one."""
        # Decoded, because a token's name may not be its text: spaces, line ends and single bytes
        # are often spelled in another way.
        texts = (
            tokenizer.decode_batch([[i] for i in range(vocab_size)], skip_special_tokens=False)
            if strings
            else []
        )
        tokens = {*eos_ids, *(i for i, text in enumerate(texts) if any(s in text for s in strings))}
        mask_V = np.zeros(vocab_size, bool)
        mask_V[list(tokens)] = True
        return cls(tokenizer, eos_ids, strings, frozenset(tokens), jax.device_put(mask_V))

    @property
    def in_one_token(self) -> bool:
        """True if `tokens` alone catch every stop string, as a single byte cannot be spread over
        several tokens."""
        return all(len(s.encode()) == 1 for s in self.strings)

    def cut(self, tokens: Sequence[int]) -> tuple[str, tuple[int, ...], bool]:
        """Cuts a run of new tokens at its end.

        Returns:
          The text before the first stop string, the tokens up to and with the one that ended the
            reply, and whether it has ended.
        """
        end = next((n for n, token in enumerate(tokens, 1) if token in self.tokens), None)
        tokens = tokens[:end]
        if self._first(self._text(tokens)) is not None:
            sizes = range(1, len(tokens) + 1)
            end = sizes[
                bisect.bisect_left(
                    sizes, True, key=lambda n: self._first(self._text(tokens[:n])) is not None
                )
            ]
            tokens = tokens[:end]
        text = self._text(tokens)
        return text[: self._first(text)], tuple(tokens), end is not None

    def _text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode([token for token in tokens if token not in self.eos_ids])

    def _first(self, text: str) -> int | None:
        """Returns the position of the first stop string."""
        return min((at for s in self.strings if (at := text.find(s)) >= 0), default=None)
