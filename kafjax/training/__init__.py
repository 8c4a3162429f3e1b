"""Training: examples packed into batches, the objective, the optimizer, the sharded step,
checkpoints and the loop around them."""

from kafjax.training.batches import (
    Batch,
    Batches,
    Example,
    answer_example,
    make_batch,
    text_example,
    text_examples,
)
from kafjax.training.config import TrainConfig
from kafjax.training.loop import TrainResult, check, discard_checkpoints, train
from kafjax.training.task import layout

__all__ = [
    "Batch",
    "Batches",
    "Example",
    "TrainConfig",
    "TrainResult",
    "answer_example",
    "check",
    "discard_checkpoints",
    "layout",
    "make_batch",
    "text_example",
    "text_examples",
    "train",
]
