"""Trains runs of `finetune` that differ only in what lanes can vary as one program.

    python -m experiments.finetune_pack --runs=runs --run=a=a.json --run=b=b.json

Each run is NAME=CONFIG, the name of its folder and a file as `finetune --config` reads it. One
compile and one copy of the base serve all of them (docs/lanes.md). The folder of a run is that of
`finetune` with its settings: the same identity, configuration, checkpoints and result, so a run may
begin here and go on alone, or the reverse. What is done is skipped. A run that diverges fails, and
the others go on. `launch.sweep` starts this for runs that share a program.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from experiments import build
from experiments.configs.finetune import Finetune
from experiments.finetune import open_lesson, save_result
from kafjax import hub, lora
from kafjax.core import paths, trees
from kafjax.core.command_line import define, from_flags
from kafjax.core.config import Config, changed, leaves, option
from kafjax.core.config_record import config_hash, record
from kafjax.core.errors import UserError, run_main
from kafjax.core.progress import say, waiting
from kafjax.core.rundir import Run, environment, open_run
from kafjax.models import Decoder
from kafjax.parallel import n_data_shares
from kafjax.parallel.chips import UNKNOWN
from kafjax.parallel.estimate import estimate
from kafjax.training import TrainResult, discard_checkpoints, placement
from kafjax.training.batches import Batch
from kafjax.training.checksum import weights_hash
from kafjax.training.demand import training_demand
from kafjax.training.lane import Lane, LaneResult, check_lanes
from kafjax.training.lane_step import LaneTask, free_bytes, lanes_that_fit
from kafjax.training.lanes import train_lanes
from kafjax.training.loop import Data, batches_of, refuse_checkpoints
from kafjax.training.task import Task
from kafjax.training.track import MODES, tracker


@dataclasses.dataclass(frozen=True)
class Pack(Config):
    """Runs of one program."""

    run: tuple[str, ...] = option(
        (), "Run, NAME=CONFIG: its folder's name, and its configuration's file.", repeat=True
    )
    runs: str = option("runs", "Folder that runs are written to.", path=True, bucket=True)
    wandb: str = option("off", "Mirror of the metrics to wandb, a run each.", choices=MODES)


def shared_by(config: Finetune, model: Decoder) -> str | None:
    """Hashes the settings that runs of one program share; None for a run that has to train alone.

    Lanes share their texts: a generated corpus differs from seed to seed, a folder does not.
    """
    alone = config.method != "lora" or config.budget is not None or config.rows is not None
    if alone or config.processes.coordinator is not None:
        return None
    try:
        params = model.abstract_params()
        check_lanes(params, config.train, [_lane(config, "alone")])
        lora.lanes.padded_shapes([config.spec], params)
    except UserError:
        return None
    if model.config.n_experts:
        return None
    free = {"lr", *(leaf.flag for leaf in leaves(config.spec))}
    free |= set() if config.corpus.is_generated else {"seed"}
    return config_hash({name: value for name, value in record(config).items() if name not in free})


def run(pack: Pack) -> None:
    """Trains the runs of a pack that are not done.

    Raises:
      UserError: anything that the user can mend, or runs that diverged, each told in a line.
      Preempted: SIGTERM came; the steps of all are saved, if checkpoints are.
    """
    configs = dict(_configs(pack))
    first = next(iter(configs.values()))
    refuse_checkpoints(paths.as_path(pack.runs), first.train)
    template, tokenizer = (
        build.open_template(first.model.model, first.model.chat),
        hub.tokenizer(first.model.model),
    )
    model, prompts = build.asked_through(
        template, build.describe_decoder(first.model, in_lanes=True), tokenizer
    )
    if len({shared_by(config, model) for config in configs.values()} | {None}) != 2:
        raise UserError(
            f"{', '.join(configs)} do not share a program; train them alone (experiments.finetune)"
        )
    chat = build.chat_identity(template)
    lesson = open_lesson(first, model, tokenizer, prompts, chat)
    also = {**lesson.identity, **chat}
    runs = {
        name: open_run(paths.as_path(pack.runs), name, config, prefix="finetune-lora", also=also)
        for name, config in configs.items()
    }
    lanes = []
    for name, opened in runs.items():
        if opened.file("result.json").exists():
            discard_checkpoints(opened.path)  # of a start that ended in between
            say(name, "finished earlier")
        else:
            lanes.append(_lane(configs[name], name))
    if lanes:
        _train(pack, runs, configs, lanes, model, lesson.examples)


def _train(
    pack: Pack,
    runs: Mapping[str, Run],
    configs: Mapping[str, Finetune],
    lanes: Sequence[Lane],
    model: Decoder,
    examples: Data,
) -> None:
    first = configs[lanes[0].name]
    mesh = build.open_mesh(first.mesh, model, first.train, first.spec, label="pack")
    stored = build.abstract_params(first.model, model)
    params = build.load_weights(
        first.model, placement(model, first.train, mesh, lanes[0].spec, stored)
    )
    code = environment() | {"weights": weights_hash(params)}
    batch = batches_of(examples, lanes[0].config(first.train), n_data_shares(mesh))[0]
    slots = _slots(model, params, first, lanes, mesh, batch)
    diverged: list[str] = []
    with contextlib.ExitStack() as opened:
        tracks = {
            lane.name: opened.enter_context(
                tracker(runs[lane.name].path, pack.wandb, record(configs[lane.name]))
            )
            for lane in lanes
        }

        def log(label: str, **row: Any) -> None:
            runs[label].log(method="lora", label="lora", **row)
            tracks[label](label="lora", **row)

        def save(lane: Lane, result: LaneResult) -> None:
            if result.ending == "diverged":
                lost = result.curve[-1]
                diverged.append(lane.name)
                say(
                    lane.name,
                    f"error: lora: the loss is {lost['loss']} at step {lost['step']}; "
                    f"lower the learning rate ({lane.learning_rate:g})",
                )
                return
            alone = Task.lora(
                model, params, lane.config(first.train), mesh, len(result.curve), lane.spec
            )
            took = _took(lane, result, alone, batch)
            save_result(runs[lane.name], "lora", code, took, tracks[lane.name])
            runs[lane.name].close()

        kept = {"run_dir": paths.as_path(pack.runs), "on_done": save, "log": log}
        results = train_lanes(
            model, params, examples, first.train, lanes, slots=slots, mesh=mesh, **kept
        )
    compiled = sum(result.compile_seconds for result in results.values())
    say(
        "pack",
        f"compiled once in {compiled:.1f} s for {len(lanes)} runs; the base, "
        f"{trees.n_bytes(params) / 1e9:.2g} GB, was held once",
    )
    if diverged:
        raise UserError(f"{len(diverged)} of {len(lanes)} runs diverged: {', '.join(diverged)}")


def _slots(
    model: Decoder,
    params: trees.Tree,
    config: Finetune,
    lanes: Sequence[Lane],
    mesh: Mesh,
    batch: Batch,
) -> int:
    """Returns how many lanes train at a time. The compiler is asked, which takes two compilations,
    unless memory holds twice what the formula says for all of them."""
    shapes = lora.lanes.padded_shapes([lane.spec for lane in lanes], params)
    largest = max((lane.spec for lane in lanes), key=lambda spec: spec.rank)
    shards = mesh.shape["lane"]
    demand = training_demand(model, config.train, largest, lanes=len(lanes))
    if 2 * estimate(demand, mesh.shape, UNKNOWN).n_bytes < free_bytes():
        slots, why = -(-len(lanes) // shards) * shards, "all of them"
    else:
        with waiting("pack", "asking the compiler how many lanes memory holds"):
            one = LaneTask.build(model, params, config.train, mesh, shapes, shards)
            slots, why = lanes_that_fit(one, batch, len(lanes))
    say("pack", f"{len(lanes)} runs in one program, {slots} at a time: {why}")
    return slots


def _took(lane: Lane, result: LaneResult, alone: Task, batch: Batch) -> TrainResult:
    """Puts a lane's result as `train` gives it. Its seconds are its share of the program's, its
    FLOPs those of the run alone."""
    n_steps, targets = len(result.curve), int(sum(row["targets"] for row in result.curve))
    a_step, a_place = alone.flops(batch)
    executed = a_step * n_steps + a_place * targets
    return TrainResult(
        trainable=result.adapters,
        spec=lane.spec,
        curve=result.curve,
        steps=n_steps,
        tokens=result.tokens,
        targets=targets,
        seconds=result.seconds,
        compile_seconds=result.compile_seconds,
        tokens_per_second=result.tokens / result.seconds,
        trainable_parameters=sum(
            x.size for pair in result.adapters.values() for x in pair.values()
        ),
        optimizer_bytes=sum(
            x.size * x.dtype.itemsize for x in jax.tree.leaves(alone.abstract.opt_state)
        ),
        flops_measured=executed,
        flops_useful=executed,
        peak_memory_bytes=result.peak_memory_bytes,
        final_loss=result.curve[-1]["loss"],
        lanes=result.lanes,
    )


def _lane(config: Finetune, name: str) -> Lane:
    rate = config.resolved().lr
    assert rate is not None
    return Lane(name, config.spec, rate, config.train.seed)


def _configs(pack: Pack) -> list[tuple[str, Finetune]]:
    if not pack.run:
        raise UserError("give the runs, --run=NAME=CONFIG")
    found = []
    for text in pack.run:
        name, _, file = text.partition("=")
        if not file:
            raise UserError(f"--run={text[:60]}: write NAME=CONFIG, such as a=runs/a/config.json")
        found.append((name, _config(file)))
    return found


def _config(file: str) -> Finetune:
    return changed(Finetune(), **build.read_config(Finetune, paths.as_path(file))).resolved()


def main() -> None:
    define(Pack)
    build.pin_precision()
    run_main(lambda _: run(from_flags(Pack)))


if __name__ == "__main__":
    main()
