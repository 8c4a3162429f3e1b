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
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kafjax import lora
from kafjax.core import trees
from kafjax.core.errors import Preempted, UserError
from kafjax.core.progress import Progress, say, waiting
from kafjax.models import Decoder
from kafjax.parallel import make_mesh, n_data_shares, replicated, shard
from kafjax.parallel.preemption import Preemption
from kafjax.training import optimizers
from kafjax.training.batches import Batch, Example
from kafjax.training.checkpoint import Checkpoints
from kafjax.training.config import TrainConfig
from kafjax.training.feed import Source
from kafjax.training.lane_state import drawn, padded, repack, smaller, take, unpadded
from kafjax.training.lane_step import CompiledLanes, LaneInputs, LaneTask, optimizer_of
from kafjax.training.loop import Log, batches_of, fingerprint_of, open_checkpoints
from kafjax.training.memory import PeakMemory
from kafjax.training.step import TrainState, new_state


@dataclasses.dataclass(frozen=True)
class Lane:
    """One adapter of a sweep, by the settings in which lanes may differ. `name` is a unique folder
    name."""

    name: str
    spec: lora.Spec
    learning_rate: float
    seed: int = 0

    def config(self, shared: TrainConfig) -> TrainConfig:
        """Configuration of the same adapter trained alone."""
        return dataclasses.replace(shared, learning_rate=self.learning_rate, seed=self.seed)


@dataclasses.dataclass(frozen=True)
class EarlyStop:
    """Early stopping: a lane leaves when its loss on `examples`, computed every `every` steps, has
    not improved for `patience` times."""

    examples: Sequence[Example]
    every: int = 20
    patience: int = 3


@dataclasses.dataclass(frozen=True)
class LaneResult:
    """Result of a lane.

    Attributes:
      adapters: at its own rank, as `train` would have given them.
      curve: a dict a step, as of `train`.
      checks: `{"step", "loss"}` of each look at the examples of `EarlyStop`.
      ending: finished, stopped (early) or diverged (its loss was no longer finite; the others go
        on).
      tokens: trained on, padding not counted.
      seconds, compile_seconds: its share of the steps' and of the compiler's.
      peak_memory_bytes: of the process, for all lanes together.
      lanes: number of lanes that shared the program.
    """

    adapters: lora.Adapters
    curve: list[dict[str, float]]
    checks: list[dict[str, float]]
    ending: str
    tokens: int
    seconds: float
    compile_seconds: float
    peak_memory_bytes: int
    lanes: int


@dataclasses.dataclass
class _Occupant:
    """A lane while it trains. `history` is what its checkpoints keep beside the state, `saved` the
    step of the last of them."""

    lane: Lane
    batches: Source
    n_steps: int
    history: dict[str, Any]
    checkpoints: Checkpoints | None
    opened: contextlib.ExitStack
    saved: int = 0

    @property
    def done(self) -> int:
        return len(self.history["curve"])

    @property
    def ending(self) -> str | None:
        return self.history.get("ending") or ("finished" if self.done >= self.n_steps else None)


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


def check_lanes(params: trees.Tree, config: TrainConfig, lanes: Sequence[Lane]) -> None:
    """Raises what `train_lanes` would raise for invalid lanes."""
    if not lanes:
        raise UserError("there are no lanes to train: the list is empty")
    if (config.optimizer, config.param_dtype) != ("adamw", "float32"):
        given = f"{config.param_dtype} with {config.optimizer}"
        raise UserError(
            f"lanes train in float32 with adamw, not in {given}; train such adapters alone"
        )
    for name, count in collections.Counter(lane.name for lane in lanes).items():
        if count > 1:
            raise UserError(f"two lanes are named '{name}'")
    for lane in lanes:
        lane.config(config)
        lora.lanes.check(lane.spec)
        lora.abstract(lane.spec, params)


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
    occupants: list[_Occupant | None] = dataclasses.field(init=False)
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
        self.n_steps = {
            seed: self.task.config.steps or len(batches) for seed, batches in self.data.items()
        }
        self.total = sum(self.n_steps[lane.seed] for lane in self.waiting)
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

    def _open(self, lane: Lane) -> tuple[_Occupant, TrainState]:
        """Opens a lane at its start, or at its last checkpoint."""
        task, config = self.task, lane.config(self.task.config)
        opened = self.opened.enter_context(contextlib.ExitStack())
        folder = None if self.run_dir is None else self.run_dir / lane.name
        fingerprint = fingerprint_of(task.model, self.params, self.variants, config, lane.spec)
        checkpoints = opened.enter_context(open_checkpoints(folder, config, fingerprint))
        optimizer = optimizer_of(config)
        abstract = jax.eval_shape(
            lambda adapters: new_state(adapters, optimizer), lora.abstract(lane.spec, self.params)
        )
        everywhere = replicated(task.mesh)
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), abstract
        )
        restored = None if checkpoints is None else checkpoints.restore(abstract)
        if restored is None:
            adapters = drawn(
                dataclasses.replace(lane.spec, alpha=1.0), task.model, jax.random.key(lane.seed)
            )
            restored = new_state(adapters, optimizer), {"seconds": 0.0, "curve": []}
        state, history = restored
        occupant = _Occupant(
            lane, self.data[lane.seed], self.n_steps[lane.seed], history, checkpoints, opened
        )
        occupant.saved = occupant.done
        if occupant.done:
            self.bar.advance(occupant.done)
            say(lane.name, f"resuming after step {occupant.done} of {occupant.n_steps}")
        return occupant, state

    def _leave_and_fill(self) -> bool:
        """Closes finished lanes and opens waiting ones in their slots. True if any lane had finished."""
        leaving = [
            (slot, occupant, occupant.ending)
            for slot, occupant in self._occupied()
            if occupant.ending
        ]
        for slot, occupant, ending in leaving:
            self._close(occupant, ending, self._own_state(slot, occupant))
            self.occupants[slot] = None
        if leaving:
            self._fill()
            self._repack_if_it_pays()
        return bool(leaving)

    def _close(self, occupant: _Occupant, ending: str, state: TrainState) -> None:
        curve = occupant.history["curve"]
        tokens = sum(row["tokens"] for row in curve)
        adapters = jax.tree.map(jnp.asarray, state.trainable)
        compiling = sum(program.seconds for program in self.programs.values())
        result = LaneResult(
            adapters=adapters,
            curve=curve,
            checks=occupant.history.get("checks", []),
            ending=ending,
            tokens=int(tokens),
            seconds=occupant.history["seconds"],
            compile_seconds=compiling / self.n_lanes,
            peak_memory_bytes=self.peak.n_bytes,
            lanes=self.n_lanes,
        )
        self.results[occupant.lane.name] = result
        self.bar.advance(occupant.n_steps - occupant.done)
        occupant.opened.close()
        if self.on_done is not None:
            self.on_done(occupant.lane, result)

    def _occupied(self) -> list[tuple[int, _Occupant]]:
        """Lists the occupied slots with their lanes."""
        return [(slot, occupant) for slot, occupant in enumerate(self.occupants) if occupant]

    def _own_state(self, slot: int, occupant: _Occupant) -> TrainState:
        """Returns the state in a slot, as the lane would have it alone."""
        return unpadded(
            take(self.state, np.int32(slot)), lora.abstract(occupant.lane.spec, self.params)
        )

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
        rows = [self._inputs_of(occupant) if occupant else None for occupant in self.occupants]
        if not any(rows):
            return None
        filler = dataclasses.replace(next(filter(None, rows)), active_N=np.bool_(False))
        return self.task.shard_inputs(
            jax.tree.map(lambda *leaves: np.stack(leaves), *(row or filler for row in rows))
        )

    def _inputs_of(self, occupant: _Occupant) -> LaneInputs:
        warmup = optimizers.warmup_steps(occupant.n_steps, self.task.config.warmup_fraction)
        scales = lora.lanes.scales(occupant.lane.spec, self.params, self.task.shapes)
        return LaneInputs(
            scales,
            np.float32(occupant.lane.learning_rate),
            np.int32(warmup),
            np.int32(occupant.n_steps),
            np.bool_(True),
        )

    def _batch(self, ahead: int = 0) -> Batch | None:
        """Returns the rows of each lane `ahead` steps from now. A slot that is or will be idle gets
        any rows."""

        def rows(occupant: _Occupant) -> Batch:
            return occupant.batches[min(occupant.done + ahead, occupant.n_steps - 1)]

        occupied = [occupant for occupant in self.occupants if occupant]
        if not occupied:
            return None
        filler = rows(occupied[0])
        axis = 0 if self.task.config.accumulate == 1 else 1

        def stack(*leaves: np.ndarray) -> np.ndarray:
            return np.stack(leaves, axis)

        return shard(
            jax.tree.map(
                stack, *(rows(occupant) if occupant else filler for occupant in self.occupants)
            ),
            self.task.batch_sharding(),
        )

    def _record(self, metrics: Mapping[str, np.ndarray], seconds: float) -> None:
        self.n_ticks += 1
        self.seconds += seconds
        occupied = self._occupied()
        for slot, occupant in occupied:
            step = occupant.done
            row = {
                "step": step + 1,
                **{name: float(value[slot]) for name, value in metrics.items()},
            }
            row["tokens"] = occupant.batches.n_tokens(step)
            self.tokens += row["tokens"]
            occupant.history["curve"].append(row)
            occupant.history["seconds"] += seconds / len(occupied)
            if not math.isfinite(row["loss"]):
                occupant.history["ending"] = "diverged"
                say(
                    occupant.lane.name,
                    f"the loss is {row['loss']} at step {step + 1}: learning rate {occupant.lane.learning_rate:g} is too high",
                )
            if self.log is not None and jax.process_index() == 0:
                self.log(label=occupant.lane.name, **row)
        losses = [occupant.history["curve"][-1]["loss"] for _, occupant in occupied]
        text = f"{len(occupied)} lanes, loss {min(losses):.3f} to {max(losses):.3f}, {self.tokens / self.seconds:.0f} tokens/s"
        self.bar.advance(len(occupied), text)
        if self.early_stop:
            self._look(self.early_stop)
        for slot, occupant in occupied:
            if (
                occupant.checkpoints is not None
                and occupant.done % self.task.config.checkpoint_every == 0
                and not occupant.ending
            ):
                self._save(slot, occupant, occupant.checkpoints)

    def _save(self, slot: int, occupant: _Occupant, checkpoints: Checkpoints) -> None:
        checkpoints.save(
            occupant.done,
            shard(self._own_state(slot, occupant), replicated(self.task.mesh)),
            occupant.history,
        )
        occupant.saved = occupant.done

    def _save_and_leave(self) -> None:
        """Saves each lane that has trained since its last checkpoint, waits for the disk and raises
        `Preempted`."""
        occupied = self._occupied()
        kept = [
            (slot, occupant, occupant.checkpoints)
            for slot, occupant in occupied
            if occupant.checkpoints is not None
        ]
        if len(kept) < len(occupied):
            raise Preempted(
                f"{self.label}: the steps of {len(occupied)} lanes are lost, as checkpoints are off"
            )
        for slot, occupant, checkpoints in kept:
            if occupant.done > occupant.saved:
                self._save(slot, occupant, checkpoints)
        for _, _, checkpoints in kept:
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
            checks = occupant.history.setdefault("checks", [])
            checks.append({"step": occupant.done, "loss": float(losses_N[slot])})
            best = min(range(len(checks)), key=lambda i: checks[i]["loss"])
            if len(checks) - 1 - best >= stop.patience:
                occupant.history["ending"] = "stopped"


def _all_batches(examples: Sequence[Example], task: LaneTask) -> list[Batch]:
    config = dataclasses.replace(task.config, epochs=1, steps=None, accumulate=1, seed=0)
    batches = batches_of([examples], config, n_data_shares(task.mesh))
    return [batches[i] for i in range(len(batches))]


def _for_lanes(batch: Batch, task: LaneTask) -> Batch:
    return jax.tree.map(lambda x: np.broadcast_to(x, (task.n_lanes, *x.shape)), batch)
