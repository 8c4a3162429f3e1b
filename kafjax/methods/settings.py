"""Every knob that the methods share, with its default. The experiments turn these into flags."""

from __future__ import annotations

import dataclasses

from kafjax.core.errors import UserError
from kafjax.retrieval.index import ENGINES


@dataclasses.dataclass(frozen=True)
class Settings:
    """Training, retrieval and generation of all methods.

    Attributes:
      epochs: passes of training over the corpus, for each trained method.
      lr_full, lr_lora: peak learning rates; LoRA's best one is about ten times that of full fine-tuning.
      rank, alpha, targets: of the adapter.
      freeze_embedding: full fine-tuning leaves the embedding as it is.
      batch_rows, seq_len: rows of packed tokens per step, tokens per row.
      replay: share of the training examples that are about other matters, to soften forgetting.
      document_parts: an epoch reads every so many-th document (biographies say everything several times over).
      checkpoint_every: steps between checkpoints; 0 for none.
      k: passages retrieved per question.
      engine: of the index: auto, scann or exact.
      max_new_tokens: longest answer; hyde_tokens: longest hypothetical passage.
      batch: questions answered at a time.
      seed: of data order, adapter start and sampling.
    """

    epochs: int = 8
    lr_full: float = 1e-4
    lr_lora: float = 1e-3
    rank: int = 16
    alpha: float = 32.0
    targets: str = r"(q|k|v|o|gate|up|down)_proj"
    freeze_embedding: bool = True
    batch_rows: int = 2
    seq_len: int = 128
    replay: float = 0.0
    document_parts: int = 1
    checkpoint_every: int = 50
    k: int = 5
    engine: str = "auto"
    max_new_tokens: int = 12
    hyde_tokens: int = 24
    batch: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.replay <= 0.99:  # 0.999999 would train on a million examples for each of the corpus
            raise UserError(f"replay={self.replay}: must be at least 0 and at most 0.99 (a share of the training examples)")
        for name in ("k", "batch", "document_parts", "hyde_tokens", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be 1 or more")
        if self.engine not in ENGINES:
            raise UserError(f"engine='{self.engine}': must be one of {', '.join(ENGINES)}")
