"""The configuration of `experiments.finetune`."""

from __future__ import annotations

import dataclasses

from experiments.configs.shared import MESH, ModelConfig, Processes, RunConfig, budget_flag
from kafjax import lora
from kafjax.core.config import Config, nested, option
from kafjax.corpus import CorpusConfig
from kafjax.methods import REPLAY, TRAIN
from kafjax.training.config import LEARNING_RATE, TrainConfig
from kafjax.training.track import MODES


@dataclasses.dataclass(frozen=True)
class Finetune(Config):
    """One training, full or LoRA."""

    model: ModelConfig = nested(ModelConfig())
    corpus: CorpusConfig = nested(CorpusConfig(), without=("controls",))
    method: str = option(
        "lora", "What to train: a LoRA adapter, or all weights.", choices=tuple(LEARNING_RATE)
    )
    lr: float | None = option(
        None, "Training: peak learning rate (default: 1e-3 for lora, 1e-4 for full).", above=0
    )
    train: TrainConfig = nested(TRAIN, without=("learning_rate",))
    spec: lora.Spec = nested(lora.Spec())
    replay: float = option(
        0.0,
        "Training: share of examples about other matters mixed in. It softens forgetting.",
        **REPLAY,
    )
    rows: str | None = option(
        None,
        "Folder of scripts/pack_rows.py: train on its rows instead of packing --corpus in memory.",
        path=True,
    )
    mesh: str = option("auto", MESH, identity=False)
    budget: str | None = budget_flag()
    wandb: str = option(
        "off",
        "Mirror of metrics, figures and answers to wandb: offline in the run's folder, for `wandb sync`, or online.",
        choices=MODES,
        record=False,
    )
    processes: Processes = nested(Processes())
    run: RunConfig = nested(RunConfig())

    def resolved(self) -> Finetune:
        """Returns the configuration with the learning rate of its method."""
        return dataclasses.replace(
            self, lr=LEARNING_RATE[self.method] if self.lr is None else self.lr
        )
