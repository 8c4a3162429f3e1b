"""Training and asking of a sweep's lanes: those that have no record are trained, those that have no
answers are asked.

runs/NAME/lanes/LANE/adapter.safetensors     its adapter, at its own rank; none if it diverged
runs/NAME/lanes/LANE/trained.json            `TrainedLane`, written last: a lane with it is trained
runs/NAME/lanes/LANE/predictions.jsonl       its answers; those of the base model are in lanes/base
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from kafjax import lora
from kafjax.core import trees
from kafjax.core.progress import Progress, say, waiting
from kafjax.core.records import Corpus
from kafjax.core.rundir import Run, write_json, write_jsonl
from kafjax.core.schema import Count
from kafjax.generation import Generator, Sampling
from kafjax.lora.files import ADAPTER
from kafjax.methods.predict import prediction
from kafjax.models import Decoder
from kafjax.parallel import n_data_shares
from kafjax.prompts.prompt import Prompts
from kafjax.training import Example, TrainConfig, discard_checkpoints
from kafjax.training.lane import EarlyStop, Lane, LaneResult
from kafjax.training.lane_step import LaneTask, lanes_that_fit
from kafjax.training.lanes import train_lanes
from kafjax.training.loop import batches_of

BASE = "base"


@dataclasses.dataclass(frozen=True)
class TrainedLane:
    """Contents of `trained.json`. Lanes share their program and their time, so what one took alone
    is not known.

    Attributes:
      final_loss: mean over the last tenth of the steps; None where the lane diverged.
      checks: `{"step", "loss"}` of each look at what `--early_stop` watches.
      environment: code, machine and weights that it was computed with.
    """

    rank: Count
    alpha: float
    learning_rate: float
    targets: str
    seed: int
    ending: Literal["finished", "stopped", "diverged"]
    steps: Count
    tokens: Count
    final_loss: float | None
    checks: list[dict[str, float]]
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)


def train_missing(
    run: Run,
    model: Decoder,
    params: trees.Tree,
    examples: list[list[Example]],
    config: TrainConfig,
    lanes: Sequence[Lane],
    *,
    mesh: Any,
    stop: EarlyStop | None,
    slots: int | None,
    code: dict[str, Any],
) -> None:
    """Trains the lanes that have left no `trained.json`, `slots` at a time, and saves each as soon
    as it is done.

    `code` is noted as their environment.
    """
    folder = run.file("lanes")
    for finished in folder.glob("*/trained.json"):
        discard_checkpoints(finished.parent)  # of a start that ended in between
    pending = [lane for lane in lanes if not (folder / lane.name / "trained.json").exists()]
    if len(pending) < len(lanes):
        say("sweep", f"{len(lanes) - len(pending)} lanes were trained earlier")
    if not pending:
        return
    shapes = lora.lanes.padded_shapes([lane.spec for lane in lanes], params)
    if slots is None:
        batch = batches_of(
            examples, dataclasses.replace(config, seed=pending[0].seed), n_data_shares(mesh)
        )[0]
        with waiting("sweep", "asking the compiler how many lanes memory holds"):
            slots, why = lanes_that_fit(
                LaneTask.build(model, params, config, mesh, shapes, mesh.shape["lane"]),
                batch,
                len(pending),
            )
        say("sweep", f"{slots} lanes at a time: {why}")

    def save(lane: Lane, result: LaneResult) -> None:
        last = [row["loss"] for row in result.curve[-max(len(result.curve) // 10, 1) :]]
        if result.ending != "diverged":  # its adapter is of no use, and holds NaN
            lora.save(folder / lane.name / ADAPTER, result.adapters, lane.spec)
        trained = TrainedLane(
            rank=lane.spec.rank,
            alpha=lane.spec.alpha,
            learning_rate=lane.learning_rate,
            targets=lane.spec.targets,
            seed=lane.seed,
            ending=result.ending,
            steps=len(result.curve),
            tokens=result.tokens,
            final_loss=float(np.mean(last)) if np.isfinite(last).all() else None,
            checks=result.checks,
            environment=code,
        )
        write_json(folder / lane.name / "trained.json", dataclasses.asdict(trained))
        discard_checkpoints(folder / lane.name)

    kept = {"early_stop": stop, "run_dir": folder, "on_done": save, "log": run.log}
    train_lanes(
        model, params, examples, config, pending, slots=slots, shapes=shapes, mesh=mesh, **kept
    )


def answer_missing(
    run: Run,
    generator: Generator,
    params: trees.Tree,
    corpus: Corpus,
    lanes: Sequence[Lane],
    max_new_tokens: int,
    write: Prompts,
) -> None:
    """Lets the adapters answer that have not, many in one batch, and the base, from a slot that is
    empty."""
    questions, folder = [*corpus.questions, *corpus.retention], run.file("lanes")

    def missing(name: str) -> bool:
        return not (folder / name / "predictions.jsonl").exists()

    served = [lane for lane in lanes if (folder / lane.name / ADAPTER).exists()]
    pending: list[Lane | None] = [lane for lane in served if missing(lane.name)] + (
        [None] if missing(BASE) else []
    )
    if not pending:
        return
    shapes = lora.lanes.padded_shapes([lane.spec for lane in lanes], params)
    # not of `pending`: a resumed run finds its programs in the compilation cache
    n_slots = min(len(served) + 1, 8)
    slots = lora.lanes.empty_slots(params, shapes, n_slots)
    prompts, sampling = (
        [write.closed_book(q.text) for q in questions],
        Sampling(max_new_tokens=max_new_tokens),
    )
    with Progress("answers", len(pending) * len(questions), unit="question") as bar:
        for start in range(0, len(pending), n_slots):
            group = pending[start : start + n_slots]
            for slot, lane in enumerate(group):
                adapters, spec = (
                    lora.load(folder / lane.name / ADAPTER, params) if lane else ({}, lanes[0].spec)
                )
                slots = lora.lanes.put(
                    slots,
                    slot,
                    lora.lanes.pad(adapters, shapes),
                    lora.lanes.scales(spec, params, shapes),
                )
            prefix = generator.prefix(slots, write.closed_book_prefix())
            of_prompts = [slot for slot in range(len(group)) for _ in prompts]
            replies = generator.generate(
                slots, prompts * len(group), sampling, prefix, bar.advance, of_prompts
            )
            for slot, lane in enumerate(group):
                name = lane.name if lane else BASE
                of_lane = replies[slot * len(prompts) : (slot + 1) * len(prompts)]
                rows = [
                    prediction(name, question, [reply]).to_json()
                    for question, reply in zip(questions, of_lane, strict=True)
                ]
                write_jsonl(folder / name / "predictions.jsonl", rows)
