"""`train_lanes`: a whole LoRA sweep as one program. Lanes fill slots, leave when they are done, and
make room for the next.

    slots      0        1        2        3             waiting
    tick 1     r4 s0    r4 s1    r16 s0   r16 s1        r64 s0, r64 s1
    ...
    tick 41    r64 s0   r64 s1   r16 s0   r16 s1        the shorter ones are done: their slots went to the next, without a compile
    ...
    tick 61    r64 s0   r64 s1                          none is waiting: the rest is repacked into a smaller program

Each lane counts its own steps and reads its own data, so its result depends neither on its slot nor
on the lanes beside it. Its checkpoints are those of the same adapter trained alone by `train`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from kafjax import lora
from kafjax.core import trees
from kafjax.core.errors import Preempted
from kafjax.core.progress import Progress, say, waiting
from kafjax.models import Decoder
from kafjax.parallel import make_mesh, n_data_shares, shard
from kafjax.parallel.preemption import Preemption
from kafjax.training.batches import Batch, Example
from kafjax.training.config import TrainConfig
from kafjax.training.feed import Source
from kafjax.training.lane import EarlyStop, Lane, LaneResult, check_lanes
from kafjax.training.lane_occupant import Occupant, open_lane
from kafjax.training.lane_state import padded, repack, smaller
from kafjax.training.lane_step import CompiledLanes, LaneInputs, LaneTask
from kafjax.training.loop import Log, batches_of
from kafjax.training.memory import PeakMemory
from kafjax.training.step import TrainState


def train_lanes(
    model: Decoder,
    params: trees.Tree,
    variants: Sequence[Sequence[Example]],
    config: TrainConfig,
    lanes: Sequence[Lane],
    *,
    slots: int | None = None,
    shapes: lora.lanes.PaddedShapes | None = None,
    mesh: Mesh | None = None,
    early_stop: EarlyStop | None = None,
    run_dir: Path | None = None,
    on_done: Callable[[Lane, LaneResult], None] | None = None,
    log: Log | None = None,
    label: str = "lanes",
) -> dict[str, LaneResult]:
    """Trains every lane as `train(model, params, variants, lane.config(config), spec=lane.spec)`
    would, `slots` at a time.

    Args:
      config: settings of all lanes; each has its own learning rate and seed.
      slots: number of lanes that train at a time; by default all.
      shapes: shapes that the adapters are padded to; by default those that hold all of `lanes`.
      mesh: slots are split over its `lane` axis, rows over `data` and `fsdp`.
      run_dir: checkpoints go to `run_dir/NAME OF THE LANE/checkpoints`, and are resumed from there.
      on_done: called with each lane as soon as it is done.
      log: called as `log(label=NAME OF THE LANE, step=..., loss=..., ...)` after each step of each
        lane.

    Raises:
      UserError: no lanes, two of one name, one that does not fit the base, slots that do not divide
        over the mesh, and whatever `train` raises, except for a loss that is no longer finite,
        which ends only its lane.
      Preempted: SIGTERM came, and each lane that trains is saved at its step, if checkpoints are.
        In all processes alike.
    """
    mesh = make_mesh() if mesh is None else mesh
    check_lanes(params, config, lanes)
    shapes = (
        lora.lanes.padded_shapes([lane.spec for lane in lanes], params)
        if shapes is None
        else shapes
    )
    slots = -(-len(lanes) // mesh.shape["lane"]) * mesh.shape["lane"] if slots is None else slots
    task = LaneTask.build(model, params, config, mesh, shapes, slots)
    data = {
        seed: batches_of(variants, dataclasses.replace(config, seed=seed), n_data_shares(mesh))
        for seed in {x.seed for x in lanes}
    }
    capacity = max(batches.capacity for batches in data.values())
    for batches in data.values():
        batches.capacity = capacity  # one shape for all
    run = _Run(
        task=task,
        params=params,
        variants=variants,
        data=data,
        waiting=collections.deque(lanes),
        early_stop=early_stop,
        run_dir=run_dir,
        on_done=on_done,
        log=log,
        label=label,
    )
    return run.train_all()


@dataclasses.dataclass
class _Run:
    """A sweep while it trains.

    Attributes:
      data: the batches of each seed, all of one shape.
      waiting: lanes that have no slot yet, in their order.
      occupants: `occupants[i]` is the lane in slot i of `state`, or None.
      programs: compiled steps by their number of slots.
    """

    task: LaneTask
    params: trees.Tree
    variants: Sequence[Sequence[Example]]
    data: Mapping[int, Source]
    waiting: collections.deque[Lane]
    early_stop: EarlyStop | None
    run_dir: Path | None
    on_done: Callable[[Lane, LaneResult], None] | None
    log: Log | None
    label: str
    occupants: list[Occupant | None] = dataclasses.field(init=False)
    programs: dict[int, CompiledLanes] = dataclasses.field(init=False, default_factory=dict)
    results: dict[str, LaneResult] = dataclasses.field(init=False, default_factory=dict)
    n_ticks: int = dataclasses.field(init=False, default=0)
    tokens: int = dataclasses.field(init=False, default=0)
    seconds: float = dataclasses.field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.occupants = [None] * self.task.n_lanes
        self.state: TrainState = self.task.empty()
        self.looked_at: list[Batch] = (
            _all_batches(self.early_stop.examples, self.task) if self.early_stop else []
        )
        self.total = sum(
            self.task.config.steps or len(self.data[lane.seed]) for lane in self.waiting
        )
        self.n_lanes = len(self.waiting)

    def train_all(self) -> dict[str, LaneResult]:
        with (
            Preemption() as preemption,
            contextlib.ExitStack() as opened,
            PeakMemory() as self.peak,
            Progress(self.label, self.total) as bar,
        ):
            self.opened, self.bar = opened, bar
            self._fill()
            inputs, batch = self._inputs(), self._batch()
            while inputs is not None and batch is not None:  # a slot is taken
                program = self._program(inputs, batch)
                began = time.perf_counter()
                self.state, metrics = program.step(self.state, self.task.frozen, inputs, batch)
                following = self._batch(ahead=1)  # laid out while the device works
                metrics = jax.device_get(metrics)
                self._record(metrics, time.perf_counter() - began)
                if self._leave_and_fill():
                    inputs, following = self._inputs(), self._batch()
                batch = following
                if any(self.occupants) and preemption.reached(self.n_ticks):
                    self._save_and_leave()
        return self.results

    # Slots and their occupants.

    def _fill(self) -> None:
        for slot, occupant in enumerate(self.occupants):
            if occupant is None and self.waiting:
                self.occupants[slot], lane_state = self._open(self.waiting.popleft())
                self.state = self.task.put(
                    self.state, np.int32(slot), padded(lane_state, self.task.shapes)
                )

    def _open(self, lane: Lane) -> tuple[Occupant, TrainState]:
        opened = self.opened.enter_context(contextlib.ExitStack())
        occupant, state = open_lane(
            lane,
            self.task,
            self.params,
            self.variants,
            self.data[lane.seed],
            self.run_dir,
            opened,
        )
        if occupant.done:
            self.bar.advance(occupant.done)
        return occupant, state

    def _leave_and_fill(self) -> bool:
        """Closes finished lanes and opens waiting ones in their slots. True if any lane had finished."""
        leaving = [
            (slot, occupant, occupant.ending)
            for slot, occupant in self._occupied()
            if occupant.ending
        ]
        for slot, occupant, ending in leaving:
            self._close(slot, occupant, ending)
            self.occupants[slot] = None
        if leaving:
            self._fill()
            self._repack_if_it_pays()
        return bool(leaving)

    def _close(self, slot: int, occupant: Occupant, ending: str) -> None:
        compiling = sum(program.seconds for program in self.programs.values())
        result = occupant.result(
            ending,
            occupant.own_state(self.state, slot),
            compile_seconds=compiling / self.n_lanes,
            peak=self.peak.n_bytes,
            n_lanes=self.n_lanes,
        )
        self.results[occupant.lane.name] = result
        self.bar.advance(occupant.n_steps - occupant.done)
        occupant.opened.close()
        if self.on_done is not None:
            self.on_done(occupant.lane, result)

    def _occupied(self) -> list[tuple[int, Occupant]]:
        """Lists the occupied slots with their lanes."""
        return [(slot, occupant) for slot, occupant in enumerate(self.occupants) if occupant]

    def _repack_if_it_pays(self) -> None:
        """Repacks into half the slots or fewer, if that saves more time than compiling takes."""
        occupied = self._occupied()
        size = smaller(len(occupied), self.task.n_lanes, self.task.lane_shards)
        if not occupied or self.waiting or size == self.task.n_lanes:
            return
        ticks = max(occupant.n_steps - occupant.done for _, occupant in occupied)
        saved = ticks * self.seconds / self.n_ticks * (1 - size / self.task.n_lanes)
        if size not in self.programs and saved < self.programs[self.task.n_lanes].seconds:
            return
        say(
            self.label,
            f"{len(occupied)} of {self.task.n_lanes} lanes are left: repacked into {size}",
        )
        self.task = self.task.resized(size)
        self.state = repack(self.state, [slot for slot, _ in occupied], self.task)
        self.occupants = [*(occupant for _, occupant in occupied), *[None] * (size - len(occupied))]

    # One tick.

    def _program(self, inputs: LaneInputs, batch: Batch) -> CompiledLanes:
        n = self.task.n_lanes
        if n not in self.programs:
            config = self.task.config
            with waiting(
                self.label,
                f"compiling for {n} lanes of {config.batch_rows} x {config.seq_len} tokens",
            ):
                self.programs[n] = self.task.compile(inputs, batch)
        return self.programs[n]

    def _inputs(self) -> LaneInputs | None:
        """Inputs of the occupied slots. Empty slots get a copy, marked inactive."""
        rows = [
            occupant.inputs(self.task, self.params) if occupant else None
            for occupant in self.occupants
        ]
        if not any(rows):
            return None
        filler = dataclasses.replace(next(filter(None, rows)), active_N=np.bool_(False))
        return self.task.shard_inputs(
            jax.tree.map(lambda *leaves: np.stack(leaves), *(row or filler for row in rows))
        )

    def _batch(self, ahead: int = 0) -> Batch | None:
        """Returns the rows of each lane `ahead` steps from now. A slot that is or will be idle gets
        any rows."""
        occupied = [occupant for occupant in self.occupants if occupant]
        if not occupied:
            return None
        filler = occupied[0].rows(ahead)
        axis = 0 if self.task.config.accumulate == 1 else 1

        def stack(*leaves: np.ndarray) -> np.ndarray:
            return np.stack(leaves, axis)

        return shard(
            jax.tree.map(
                stack,
                *(occupant.rows(ahead) if occupant else filler for occupant in self.occupants),
            ),
            self.task.batch_sharding(),
        )

    def _record(self, metrics: Mapping[str, np.ndarray], seconds: float) -> None:
        self.n_ticks += 1
        self.seconds += seconds
        occupied = self._occupied()
        for slot, occupant in occupied:
            own = {name: float(value[slot]) for name, value in metrics.items()}
            row = occupant.record(own, seconds / len(occupied))
            self.tokens += row["tokens"]
            if self.log is not None and jax.process_index() == 0:
                self.log(label=occupant.lane.name, **row)
        losses = [occupant.history["curve"][-1]["loss"] for _, occupant in occupied]
        text = f"{len(occupied)} lanes, loss {min(losses):.3f} to {max(losses):.3f}, {self.tokens / self.seconds:.0f} tokens/s"
        self.bar.advance(len(occupied), text)
        if self.early_stop:
            self._look(self.early_stop)
        every = self.task.config.checkpoint_every
        for slot, occupant in occupied:
            if every and occupant.done % every == 0 and not occupant.ending:
                occupant.save(self.state, slot, self.task)

    def _save_and_leave(self) -> None:
        """Saves each lane that has trained since its last checkpoint, waits for the disk and raises
        `Preempted`."""
        occupied = self._occupied()
        kept = [one.checkpoints for _, one in occupied if one.checkpoints is not None]
        if len(kept) < len(occupied):
            raise Preempted(
                f"{self.label}: the steps of {len(occupied)} lanes are lost, as checkpoints are off"
            )
        for slot, occupant in occupied:
            occupant.save(self.state, slot, self.task)
        for checkpoints in kept:
            checkpoints.wait()
        steps = ", ".join(
            f"{occupant.lane.name} at step {occupant.done}" for _, occupant in occupied
        )
        raise Preempted(f"{self.label}: saved {steps}; run the same command again to go on")

    def _look(self, stop: EarlyStop) -> None:
        """Computes held-out losses of the lanes that are due, and ends those that have not improved
        for long enough."""
        due = [
            (slot, occupant)
            for slot, occupant in self._occupied()
            if occupant.done % stop.every == 0 and not occupant.ending
        ]
        inputs = self._inputs() if due else None
        if inputs is None:
            return
        sums = [
            self.task.losses(self.state, inputs, _for_lanes(batch, self.task))
            for batch in self.looked_at
        ]
        losses_N: Any = sum(np.asarray(total) for total, _ in sums) / sum(
            np.asarray(weight) for _, weight in sums
        )
        for slot, occupant in due:
            occupant.look(float(losses_N[slot]), stop.patience)


def _all_batches(examples: Sequence[Example], task: LaneTask) -> list[Batch]:
    config = dataclasses.replace(task.config, epochs=1, steps=None, accumulate=1, seed=0)
    batches = batches_of([examples], config, n_data_shares(task.mesh))
    return [batches[i] for i in range(len(batches))]


def _for_lanes(batch: Batch, task: LaneTask) -> Batch:
    return jax.tree.map(lambda x: np.broadcast_to(x, (task.n_lanes, *x.shape)), batch)
