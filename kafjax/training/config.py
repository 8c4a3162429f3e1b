"""How to train: the numbers that a run is made of."""

from __future__ import annotations

import dataclasses
import math

from kafjax.core.errors import UserError, nearest
from kafjax.models import REMAT
from kafjax.training.optimizers import OPTIMIZERS


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
      epochs: passes over the data.
      steps: if given, stop after so many optimizer steps instead.
      learning_rate: its peak.
      warmup_fraction: share of the steps over which it rises.
      floor_fraction: share of the peak that it falls to.
      batch_rows: rows of `seq_len` packed tokens per optimizer step.
      accumulate: microbatches that a step's rows are computed in, to save memory.
      optimizer: adamw, adafactor or muon (see `optimizers.make`).
      param_dtype: of what trains. float32: master weights. bfloat16: half the memory, also of the first moment; updates are rounded
        stochastically.
      remat: what of each layer is kept for the backward pass: none (of it is computed again), dots, full, offload (see `models.REMAT`).
      weight_decay: on matrices only.
      b1, b2, eps: AdamW's decay rates (0 to below 1) and the term in its denominator, also for what Muon leaves to AdamW.
      clip_norm: bound of the gradient's global norm.
      freeze_embedding: full fine-tuning leaves the (tied) embedding as it is. LoRA does unless its `Spec` says otherwise.
      lora_plus: the learning rate of LoRA's `b` is so many times that of the rest (LoRA+, Hayou et al. 2024, arXiv:2402.12354).
      loss_chunk: most rows of logits alive at once on a device.
      checkpoint_every: steps between checkpoints, 0 for none.
      seed: of the data order, of the adapter's start and of dropout.
    """

    epochs: int = 1
    steps: int | None = None
    learning_rate: float = 1e-4
    warmup_fraction: float = 0.05
    floor_fraction: float = 0.1
    batch_rows: int = 8
    seq_len: int = 128
    accumulate: int = 1
    optimizer: str = "adamw"
    param_dtype: str = "float32"
    remat: str = "none"
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 1.0
    freeze_embedding: bool = True
    lora_plus: float = 1.0
    loss_chunk: int = 256
    checkpoint_every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_rows", "seq_len", "accumulate", "loss_chunk"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be 1 or more")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"steps={self.steps}: must be 1 or more")
        for name, known in (("optimizer", OPTIMIZERS), ("param_dtype", ("float32", "bfloat16")), ("remat", REMAT)):
            if getattr(self, name) not in known:
                raise UserError(f"unknown {name} '{getattr(self, name)}'. {nearest(getattr(self, name), known)}")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 0 and below 1")
        for name in ("learning_rate", "eps", "clip_norm", "lora_plus"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise UserError(f"{name}={getattr(self, name)}: must be above 0")
