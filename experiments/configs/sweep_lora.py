"""The configuration of `experiments.sweep_lora`."""

from __future__ import annotations

import dataclasses

from experiments.configs.shared import ModelConfig, RunConfig
from kafjax import lora
from kafjax.core.config import Config, nested, option
from kafjax.corpus import CorpusConfig
from kafjax.generation.config import GenerationConfig
from kafjax.methods import REPLAY, TRAIN
from kafjax.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class SweepLora(Config):
    """A grid of adapters that train as one program."""

    model: ModelConfig = nested(ModelConfig())
    corpus: CorpusConfig = nested(CorpusConfig(), without=("controls",))
    ranks: tuple[int, ...] = option(
        (4, 16), "Grid: ranks, separated by commas.", least=1, identity=False
    )
    alphas: tuple[str, ...] = option(
        ("32",),
        "Grid: alphas; 2r is twice the rank. The update is scaled by alpha / rank.",
        identity=False,
    )
    lrs: tuple[float, ...] = option(
        (3e-4, 1e-3), "Grid: peak learning rates.", above=0, identity=False
    )
    seeds: tuple[int, ...] = option(
        (0, 1),
        "Grid: seeds of the adapter's start and of the order of the data.",
        least=0,
        identity=False,
    )
    targets: tuple[str, ...] = option(
        (lora.Spec().targets,),
        "Grid: kernels to adapt, by a regular expression; may be repeated.",
        identity=False,
        repeat=True,
    )
    rslora: bool = option(False, "Scale by alpha / sqrt(rank) instead (rsLoRA).")
    lanes: int | None = option(
        None,
        "Lanes that train at a time (default: as many as memory holds).",
        least=1,
        identity=False,
    )
    train: TrainConfig = nested(
        TRAIN,
        without=(
            "learning_rate",
            "seed",
            "accumulate",
            "freeze_embedding",
            "optimizer",
            "param_dtype",
        ),
    )
    early_stop: int = option(
        0, "Looks without improvement after which a lane leaves; 0: none does.", least=0
    )
    look_every: int = option(10, "Steps between two looks of --early_stop.", least=1)
    replay: float = option(
        0.0,
        "Training: share of examples about other matters mixed in. It softens forgetting.",
        **REPLAY,
    )
    generation: GenerationConfig = nested(GenerationConfig(), without=("hyde_tokens",))
    seed: int = option(0, "Seed of the generated corpus.", least=0, most=2**31 - 1)
    mesh: str = option(
        "auto", "Devices by axis, such as lane:4,fsdp:2. auto: all on fsdp.", identity=False
    )
    dry_run: bool = option(False, "List the lanes and stop.", record=False)
    run: RunConfig = nested(RunConfig())
