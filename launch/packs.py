"""Runs that share a program: LoRA trainings that differ only in what lanes can vary
(`experiments/finetune_pack.py`)."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments import build
from experiments.configs.finetune import Finetune
from experiments.configs.shared import ModelConfig
from experiments.finetune_pack import shared_by
from kafjax.core.config import Config, changed
from kafjax.core.config_record import config_hash, read_record
from kafjax.core.errors import UserError
from kafjax.models import Decoder
from launch.spec import Run, experiment_named

_PACKED_ARGUMENTS = ("--wandb=",)  # of `finetune`, which a pack takes, too


def config_of(run: Run) -> Config | None:
    """Returns the run's configuration; None for an experiment that is not of `experiments`."""
    if not run.module.startswith("experiments."):
        return None
    kind = experiment_named(run.module.removeprefix("experiments."))
    return changed(kind(), **read_record(kind, run.record, f"run {run.id}"))


def programs(runs: Sequence[Run]) -> dict[str, str]:
    """Names the program of each run by its id; runs of one name may share it. Those that share
    with no other have a name of their own, their id."""
    models: dict[ModelConfig, Decoder] = {}
    names = {}
    for run in runs:
        name = None
        config = config_of(run)
        if isinstance(config, Finetune) and all(
            argument.startswith(_PACKED_ARGUMENTS) for argument in run.arguments
        ):
            try:
                if config.model not in models:
                    models[config.model] = build.describe_decoder(config.model)
                name = shared_by(config, models[config.model])
            except UserError:  # the run itself tells of it
                name = None
        names[run.id] = run.id if name is None else config_hash([name, list(run.arguments)])
    sizes = Counter(names.values())
    return {id: name if sizes[name] > 1 else id for id, name in names.items()}


def command(run_folders: Path, runs: Sequence[Run], config_files: Mapping[str, Path]) -> list[str]:
    """Lists the words that start several runs as one program."""
    named = [f"--run={run.id}={config_files[run.id]}" for run in runs]
    words = [sys.executable, "-m", "experiments.finetune_pack", f"--runs={run_folders}"]
    return [*words, *named, *runs[0].arguments]
