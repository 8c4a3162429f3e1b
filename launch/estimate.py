"""Estimates what runs will take: FLOPs, tokens and memory by the formulas of training, seconds by
runs that are done or by a roofline.

Formulas count rows that are full of tokens, all of which have a loss: real rows have padding, so
these are upper bounds. They are about training; answering questions comes on top. Seconds of
finished runs hold all of it.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments import build
from experiments.configs.compare import Compare
from experiments.configs.finetune import Finetune
from experiments.configs.shared import ModelConfig
from experiments.configs.sweep_lora import SweepLora
from experiments.finetune import open_lesson
from experiments.sweep_grid import grid
from kafjax import hub, lora
from kafjax.core import trees
from kafjax.core.config import Config, changed, leaves
from kafjax.core.config_record import config_hash
from kafjax.core.errors import UserError
from kafjax.evaluation.results import BASE
from kafjax.methods import parts
from kafjax.models import Decoder
from kafjax.parallel.chips import UNKNOWN, Slice
from kafjax.parallel.estimate import choose, estimate
from kafjax.training import TrainConfig
from kafjax.training.demand import training_demand
from kafjax.training.loop import batches_of
from launch.ledger import DONE, State
from launch.packs import config_of
from launch.spec import Run


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of a run. None where nothing is known.

    Attributes:
      flops, tokens: of all its trainings.
      memory: bytes on each device, of the largest of them.
      seconds: from `source`: finished runs, or the formulas.
      base_bytes: of the base's weights in the model's dtype.
    """

    flops: float | None = None
    tokens: float | None = None
    memory: float | None = None
    seconds: float | None = None
    source: str = ""
    base_bytes: float | None = None


def costs(
    runs: Sequence[Run], states: Mapping[str, State], topology: Slice | None
) -> dict[str, Cost]:
    """Estimates every run, by id. Corpora and models are opened once for all runs that share them.

    Raises:
      UserError: a run that would be refused, naming it.
    """
    opened = _Opened()
    by_formula = {}
    for run in runs:
        try:
            config = config_of(run)
            by_formula[run.id] = _by_formula(config, opened, topology) if config else Cost()
        except UserError as error:
            raise UserError(f"run {run.id} {dict(run.settings)}: {error}") from error
    measured = {
        run.id: states[run.id].attempts[-1].outcome.seconds
        for run in runs
        if states[run.id].name == DONE and states[run.id].attempts[-1].outcome is not None
    }
    return {run.id: _with_seconds(by_formula[run.id], run.id, measured, by_formula) for run in runs}


def _with_seconds(
    cost: Cost, id: str, measured: Mapping[str, float], by_formula: Mapping[str, Cost]
) -> Cost:
    """Takes a run's own seconds, else those of finished runs in proportion to their FLOPs, else the
    formula's."""
    if id in measured:
        return dataclasses.replace(cost, seconds=measured[id], source="measured")
    if not measured:
        return cost
    seconds = statistics.median(measured.values())
    if cost.flops:
        seconds = cost.flops * statistics.median(
            took / by_formula[other].flops for other, took in measured.items()
        )
    return dataclasses.replace(cost, seconds=seconds, source=f"{len(measured)} finished runs")


def _by_formula(config: Config, opened: _Opened, topology: Slice | None) -> Cost:
    model_config = getattr(config, "model", None)
    trainings = _trainings(config)
    if not trainings or not isinstance(model_config, ModelConfig):
        return Cost()
    model = opened.model(model_config)
    chip, n_devices = (topology.device, topology.n_devices) if topology else (UNKNOWN, 1)
    flops = tokens = memory = seconds = 0.0
    for train, spec in trainings:
        n = train.steps or opened.steps(config, train)
        demand = training_demand(model, train, spec)
        sizes = choose(demand, n_devices, chip, topology.n_slices if topology else 1)[0]
        found = estimate(demand, sizes, chip, topology.n_slices if topology else 1)
        flops, tokens = flops + n * demand.flops, tokens + n * train.batch_rows * train.seq_len
        memory, seconds = max(memory, found.n_bytes), seconds + n * found.step_seconds
    return Cost(
        flops,
        tokens,
        memory,
        seconds if topology else None,
        f"formula, {topology.name}" if topology else "",
        float(trees.count(model.abstract_params()) * np.dtype(model.dtype).itemsize),
    )


def _trainings(config: Config) -> list[tuple[TrainConfig, lora.Spec | None]]:
    """Lists what a run trains: full fine-tuning has no spec."""
    if isinstance(config, Finetune):
        return [(config.train, config.spec if config.method == "lora" else None)]
    if isinstance(config, SweepLora):
        return [(config.train, lane.spec) for lane in grid(config)]
    if isinstance(config, Compare):
        weights = dict.fromkeys(parts(name)[0] for name in config.methods)
        return [
            (config.settings.train, None if name == "full" else config.settings.spec)
            for name in weights
            if name != BASE
        ]
    return []


class _Opened:
    """Models and numbers of steps, each looked up once for all runs that share it."""

    def __init__(self) -> None:
        self._models: dict[ModelConfig, Decoder] = {}
        self._steps: dict[str, int] = {}

    def model(self, config: ModelConfig) -> Decoder:
        if config not in self._models:
            self._models[config] = build.describe_decoder(config)
        return self._models[config]

    def steps(self, config: Any, train: TrainConfig) -> int:
        """Counts the steps that the epochs come to, by packing the corpus. A generated corpus of
        another seed has about as many."""
        texts = {leaf.flag: leaf.of(config.corpus) for leaf in leaves(config.corpus)}
        texts |= {
            "model": config.model.model,
            "chat": config.model.chat,
            "replay": getattr(config, "replay", None),
        }
        texts |= {
            "rows": getattr(config, "rows", None),
            "epochs": train.epochs,
            "batch_rows": train.batch_rows,
            "seq_len": train.seq_len,
        }
        key = config_hash(texts)
        if key not in self._steps:
            flags = {leaf.flag for leaf in leaves(Finetune())}
            finetune = changed(
                Finetune(),
                **{
                    name: texts[name] for name in texts if name in flags and texts[name] is not None
                },
            )
            template, tokenizer = (
                build.open_template(finetune.model.model, finetune.model.chat),
                hub.tokenizer(finetune.model.model),
            )
            model, prompts = build.asked_through(template, self.model(finetune.model), tokenizer)
            lesson = open_lesson(finetune, model, tokenizer, prompts, build.chat_identity(template))
            self._steps[key] = len(batches_of(lesson.examples, train, 1))
        return self._steps[key]
