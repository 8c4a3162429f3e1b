"""A reply and its bill, from the place that makes it to those that score it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Generation:
    """A reply and its bill.

    Attributes:
      text: of the reply, up to EOS or a stop string.
      tokens: of the reply, the one that ended it included.
      ended: by EOS or a stop string; False where the limit of tokens cut it.
      prompt_tokens: of all of the prompt; `cached_tokens` of them came from a `Prefix`.
      prefill_seconds, decode_seconds: of the whole batch that the reply was made in.
      prompt: the whole text that was completed, its prefix included; a BOS that plain text is put
        behind is not shown.
    """

    text: str
    tokens: tuple[int, ...]
    ended: bool
    prompt_tokens: int
    cached_tokens: int
    prefill_seconds: float
    decode_seconds: float
    prompt: str = ""

    @property
    def output_tokens(self) -> int:
        return len(self.tokens)
