"""The configuration of `experiments.answer`."""

from __future__ import annotations

import dataclasses

from experiments.configs.shared import MESH, ModelConfig, index_flag
from kafjax.core.config import Config, nested, option
from kafjax.corpus import CorpusConfig
from kafjax.methods import Settings


@dataclasses.dataclass(frozen=True)
class Answer(Config):
    """One question at a time, by one method."""

    model: ModelConfig = nested(ModelConfig())
    corpus: CorpusConfig = nested(
        CorpusConfig(retention=0, held_out=0), without=("retention", "held_out")
    )
    settings: Settings = nested(
        Settings(),
        without=("train", "spec", "lr_full", "lr_lora", "replay", "batch", "batch_tokens"),
    )
    seed: int = option(0, "Seed of the generated corpus.", least=0, most=2**31 - 1)
    mesh: str = option("auto", MESH, identity=False)
    method: str = option(
        "rag",
        "Source of the model's knowledge: one of the methods of experiments.compare.",
        record=False,
    )
    index: str | None = index_flag(
        "Folder of experiments.build_index, for base, rag, hyde and rewrite. It holds the passages: no corpus is read."
    )
    question: str | None = option(
        None, "The question; without it, questions are read from the terminal.", record=False
    )
    run: str | None = option(
        None,
        "Folder of a run of experiments.compare or experiments.finetune whose work is used.",
        record=False,
        path=True,
        bucket=True,
    )
    runs: str = option(
        "runs",
        "Folder in which an index is kept, without --run.",
        record=False,
        path=True,
        bucket=True,
    )
