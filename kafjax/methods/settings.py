"""Settings shared by the methods of a comparison: training, adapter, retrieval and generation."""

from __future__ import annotations

import dataclasses

from kafjax.core.config import Config, nested, option
from kafjax.generation.config import GenerationConfig
from kafjax.lora import Spec
from kafjax.retrieval.config import RetrievalConfig
from kafjax.training import TrainConfig
from kafjax.training.config import LEARNING_RATE

TRAIN = TrainConfig(epochs=10, batch_rows=2, loss_chunk=512, checkpoint_every=50)
"""Training at the size of the experiments: what two cores do in minutes."""

REPLAY = {"least": 0, "most": 0.99}


@dataclasses.dataclass(frozen=True)
class Settings(Config):
    """Training, adapter, retrieval and generation of all methods.

    Attributes:
      document_parts: an epoch reads every so many-th document (see `CorpusConfig.document_parts`).
    """

    train: TrainConfig = nested(TRAIN, without=("learning_rate",))
    spec: Spec = nested(Spec())
    retrieval: RetrievalConfig = nested(RetrievalConfig())
    generation: GenerationConfig = nested(GenerationConfig())
    lr_full: float = option(
        LEARNING_RATE["full"], "Training: peak learning rate of full fine-tuning.", above=0
    )
    lr_lora: float = option(
        LEARNING_RATE["lora"],
        "Training: peak learning rate of LoRA (about ten times that of full).",
        above=0,
    )
    replay: float = option(
        0.0,
        "Training: share of examples about other matters mixed in. It softens forgetting.",
        **REPLAY,
    )
    raft_gold: float = option(
        0.8,
        "raft: share of its training examples in which a passage answers.",
        least=0,
        most=1,
        added=True,
    )
    raft_abstains: bool = option(
        False,
        "raft: where no passage answers, the reply that it learns is 'unknown' instead of the answer.",
        added=True,
    )
    document_parts: int = 1

    @property
    def seed(self) -> int:
        """The seed of data order, adapter start and sampling."""
        return self.train.seed
