"""The work that both sides of a benchmark are given: sizes, tokens, texts. Imports neither JAX nor
torch, so that a side's process holds its own library alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from benchmarks.turns import sample_tokens

LEARNING_RATE = 1e-4
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROMPT = "The capital of France is"
WORDS = (
    "the quick river under a silver bridge carries old letters from nine quiet islands to merchants "
    "who measure copper, weave sails and remember every harbour between winter and unhurried summer"
).split()


@dataclasses.dataclass(frozen=True)
class TrainWork:
    """A training step: `rows` texts of `seq_len` tokens.

    Attributes:
      n_last: the loss looks at so many tokens at the end of each row; at all if None.
      rank: of the adapter, whose alpha is twice that; None trains all weights but the embedding.
      dtype: of activations and of frozen weights.
      param_dtype: of the weights that full fine-tuning trains; adapters are float32.
      remat: `full` computes each layer again in the backward pass.
      steps: steps that the schedule is made for.
    """

    rows: int
    seq_len: int
    n_last: int | None = None
    rank: int | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    steps: int = 10

    @property
    def n_targets(self) -> int:
        """Tokens that the loss looks at."""
        return self.rows * (self.n_last or self.seq_len)


def tokens_of(folder: str | Path, *shape: int) -> np.ndarray:
    """Ordinary text in the tokens of a model's folder, int32 of this shape."""
    return sample_tokens(Tokenizer.from_file(str(Path(folder) / "tokenizer.json")), shape)


def texts_of(words: int, count: int) -> list[str]:
    """Draws texts of between three quarters and five quarters of `words` words."""
    rng = np.random.default_rng(0)
    return [
        " ".join(rng.choice(WORDS, int(rng.integers(3 * words // 4, 5 * words // 4 + 1))))
        for _ in range(count)
    ]
