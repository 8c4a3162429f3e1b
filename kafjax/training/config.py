"""Settings of a training, with their only defaults."""

from __future__ import annotations

import dataclasses

from kafjax.core.config import Config, option
from kafjax.models import REMAT
from kafjax.training.optimizers import OPTIMIZERS

PARAM_DTYPES = ("float32", "bfloat16")
LEARNING_RATE = {"full": 1e-4, "lora": 1e-3}
"""Peak learning rates by what trains. LoRA's best one is about ten times that of full
fine-tuning."""


@dataclasses.dataclass(frozen=True)
class TrainConfig(Config):
    """Settings of a training.

    Attributes:
      learning_rate: peak of the learning rate.
      warmup_fraction: share of the steps over which the rate rises; then it falls along a cosine.
      floor_fraction: share of the peak that the rate falls to.
      param_dtype: dtype of what trains. bfloat16 takes half the memory, also for the first moment;
        updates are rounded stochastically.
      remat: what of each layer is kept for the backward pass (see `models.REMAT`).
      b1, b2, eps: AdamW's, also for what Muon leaves to AdamW.
      lora_plus: ratio of the learning rate of LoRA's `b` to that of the rest (LoRA+, Hayou et al.
        2024, arXiv:2402.12354).
      loss_chunk: most rows of logits alive at once on a device.
      seed: of the data order, of the adapter's start and of dropout.

    The help of the other fields describes them.
    """

    epochs: int = option(1, "Training: passes over the corpus.", least=1)
    steps: int | None = option(None, "Training: optimizer steps, instead of --epochs.", least=1)
    learning_rate: float = option(
        LEARNING_RATE["full"], "Training: peak learning rate.", flag="lr", above=0
    )
    warmup_fraction: float = option(
        0.05,
        "Training: share of the steps over which the learning rate rises; then it falls along a cosine.",
        flag="warmup",
        least=0,
        most=1,
    )
    floor_fraction: float = option(
        0.1,
        "Training: share of its peak that the learning rate falls to.",
        flag="floor",
        least=0,
        most=1,
        added=True,
    )
    batch_rows: int = option(
        8, "Training: rows of packed tokens per optimizer step.", least=1, most=2**20
    )
    seq_len: int = option(
        128, "Training: tokens per row; longer texts are cut into pieces.", least=2, most=2**22
    )
    accumulate: int = option(
        1, "Training: parts that a step's rows are computed in. Same result, less memory.", least=1
    )
    optimizer: str = option(
        "adamw",
        "AdamW; Adafactor (hardly any state); Muon (one moment, orthogonalised updates).",
        choices=OPTIMIZERS,
    )
    param_dtype: str = option(
        "float32",
        "Training: type of what trains; bfloat16 halves its memory and rounds stochastically.",
        choices=PARAM_DTYPES,
    )
    remat: str = option(
        "none",
        "Training: what of each layer is kept for the backward pass: none is computed again, all but products with kernels "
        "(dots), or all (full: least memory, about a third more work; offload: its inputs go to the host's memory, on a TPU or GPU).",
        choices=REMAT,
        identity=False,
    )
    weight_decay: float = option(0.0, "Training: AdamW's, on matrices only.", least=0)
    b1: float = option(0.9, "AdamW: decay rate of the first moment.", least=0, below=1, added=True)
    b2: float = option(
        0.999, "AdamW: decay rate of the second moment.", least=0, below=1, added=True
    )
    eps: float = option(1e-8, "AdamW: term in the denominator.", above=0, added=True)
    clip_norm: float = option(1.0, "Training: bound of the gradient's global norm.", above=0)
    freeze_embedding: bool = option(
        True,
        "Full fine-tuning: leave the embedding (and an untied head) as it is; it is most of a small model.",
    )
    lora_plus: float = option(
        1.0,
        "LoRA: the learning rate of b is so many times that of the rest (LoRA+; 2 to 16).",
        above=0,
    )
    loss_chunk: int = option(
        256, "Training: most rows of logits alive at once on a device.", least=1, identity=False
    )
    checkpoint_every: int = option(
        0, "Training: steps between checkpoints; 0 for none.", least=0, identity=False
    )
    seed: int = option(
        0,
        "Seed of the generated corpus, data order, adapter start and sampling.",
        least=0,
        most=2**31 - 1,
    )
