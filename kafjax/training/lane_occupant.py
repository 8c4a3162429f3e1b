"""A lane while it trains: opened at its start or its last checkpoint, its history, its saves."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kafjax import lora
from kafjax.core import trees
from kafjax.core.progress import say
from kafjax.parallel import replicated, shard
from kafjax.training import optimizers
from kafjax.training.batches import Batch, Example
from kafjax.training.checkpoint import Checkpoints
from kafjax.training.feed import Source
from kafjax.training.lane import Lane, LaneResult
from kafjax.training.lane_state import drawn, take, unpadded
from kafjax.training.lane_step import LaneInputs, LaneTask, optimizer_of
from kafjax.training.loop import fingerprint_of, open_checkpoints
from kafjax.training.step import TrainState, new_state


@dataclasses.dataclass
class Occupant:
    """A lane in a slot.

    Attributes:
      abstract: shapes and dtypes of its adapters at its own rank.
      history: what its checkpoints keep beside the state.
      opened: closes what the lane has opened, its checkpoints.
      saved: step of its last checkpoint.
    """

    lane: Lane
    abstract: lora.lanes.PaddedShapes
    batches: Source
    n_steps: int
    history: dict[str, Any]
    checkpoints: Checkpoints | None
    opened: contextlib.ExitStack
    saved: int = 0

    @property
    def done(self) -> int:
        """Number of steps it has trained."""
        return len(self.history["curve"])

    @property
    def ending(self) -> str | None:
        """Kind of its end, as in `LaneResult`; None while it goes on."""
        return self.history.get("ending") or ("finished" if self.done >= self.n_steps else None)

    def inputs(self, task: LaneTask, params: trees.Tree) -> LaneInputs:
        """Returns what the step reads of it beside state and batch."""
        warmup = optimizers.warmup_steps(self.n_steps, task.config.warmup_fraction)
        return LaneInputs(
            lora.lanes.scales(self.lane.spec, params, task.shapes),
            np.float32(self.lane.learning_rate),
            np.int32(warmup),
            np.int32(self.n_steps),
            np.bool_(True),
        )

    def rows(self, ahead: int) -> Batch:
        """Returns its rows `ahead` steps from now; behind its last step, those of that one."""
        return self.batches[min(self.done + ahead, self.n_steps - 1)]

    def record(self, metrics: dict[str, float], seconds: float) -> dict[str, Any]:
        """Adds a step to its history and returns the row of its curve. A loss that is no longer
        finite ends it."""
        step = self.done
        row = {"step": step + 1, **metrics, "tokens": self.batches.n_tokens(step)}
        self.history["curve"].append(row)
        self.history["seconds"] += seconds
        if not math.isfinite(row["loss"]):
            self.history["ending"] = "diverged"
            say(
                self.lane.name,
                f"the loss is {row['loss']} at step {step + 1}: learning rate {self.lane.learning_rate:g} is too high",
            )
        return row

    def look(self, loss: float, patience: int) -> None:
        """Adds a held-out loss to its history, and ends it if the last `patience` of them were no
        better than one before."""
        checks = self.history.setdefault("checks", [])
        checks.append({"step": self.done, "loss": loss})
        best = min(range(len(checks)), key=lambda i: checks[i]["loss"])
        if len(checks) - 1 - best >= patience:
            self.history["ending"] = "stopped"

    def own_state(self, state: TrainState, slot: int) -> TrainState:
        """Returns the state in its slot, as the lane would have it alone."""
        return unpadded(take(state, np.int32(slot)), self.abstract)

    def save(self, state: TrainState, slot: int, task: LaneTask) -> None:
        """Writes a checkpoint of its own state, if it keeps any and has trained since the last."""
        if self.checkpoints is not None and self.done > self.saved:
            own = shard(self.own_state(state, slot), replicated(task.mesh))
            self.checkpoints.save(self.done, own, self.history)
            self.saved = self.done

    def result(
        self, ending: str, state: TrainState, *, compile_seconds: float, peak: int, n_lanes: int
    ) -> LaneResult:
        """Returns what it learned, of its own state, and its part of the bill."""
        curve = self.history["curve"]
        return LaneResult(
            adapters=jax.tree.map(jnp.asarray, state.trainable),
            curve=curve,
            checks=self.history.get("checks", []),
            ending=ending,
            tokens=int(sum(row["tokens"] for row in curve)),
            seconds=self.history["seconds"],
            compile_seconds=compile_seconds,
            peak_memory_bytes=peak,
            lanes=n_lanes,
        )


def open_lane(
    lane: Lane,
    task: LaneTask,
    params: trees.Tree,
    variants: Sequence[Sequence[Example]],
    batches: Source,
    run_dir: Path | None,
    opened: contextlib.ExitStack,
) -> tuple[Occupant, TrainState]:
    """Opens a lane at its start, or at its last checkpoint. Returns it with its own state.

    `opened` holds what it opens, until it is closed.
    """
    config = lane.config(task.config)
    folder = None if run_dir is None else run_dir / lane.name
    fingerprint = fingerprint_of(task.model, params, variants, config, lane.spec)
    checkpoints = opened.enter_context(open_checkpoints(folder, config, fingerprint))
    optimizer, shapes = optimizer_of(config), lora.abstract(lane.spec, params)
    everywhere = replicated(task.mesh)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
        jax.eval_shape(lambda adapters: new_state(adapters, optimizer), shapes),
    )
    restored = None if checkpoints is None else checkpoints.restore(abstract)
    if restored is None:
        adapters = drawn(
            dataclasses.replace(lane.spec, alpha=1.0), task.model, jax.random.key(lane.seed)
        )
        restored = new_state(adapters, optimizer), {"seconds": 0.0, "curve": []}
    state, history = restored
    n_steps = task.config.steps or len(batches)
    occupant = Occupant(lane, shapes, batches, n_steps, history, checkpoints, opened)
    occupant.saved = occupant.done
    if occupant.done:
        say(lane.name, f"resuming after step {occupant.done} of {occupant.n_steps}")
    return occupant, state
