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
from kafjax.training.loop import TrainResult, check_training, discard_checkpoints, train
from kafjax.training.task import placement

__all__ = [
    "Batch",
    "Batches",
    "Example",
    "TrainConfig",
    "TrainResult",
    "answer_example",
    "check_training",
    "discard_checkpoints",
    "make_batch",
    "placement",
    "text_example",
    "text_examples",
    "train",
]
