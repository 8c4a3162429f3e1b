"""One optimizer step of many adapters at once: `vmap` over the adapters, with one base that is not
mapped.

    state.trainable   {kernel path: {"a": [N, .., in, R], "b": [N, .., R, out]}}      N lanes
    frozen            the base, once
    batch             a `Batch` whose arrays have a leading axis of N lanes: each lane reads its own rows

A product with a kernel of the base is one product over all lanes' tokens; so is the one with the
vocabulary. Lanes share nothing else: clipping, moments, schedule and loss are each lane's own, so
that a lane computes what it would compute alone.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import psutil
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kafjax import lora
from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.core.programs import compiler_options
from kafjax.models import Decoder
from kafjax.ops.loss import even_chunk, summed_and_single_losses, used
from kafjax.parallel import BATCH_AXES, replicated, shard, shardings
from kafjax.training import optimizers
from kafjax.training.batches import Batch
from kafjax.training.config import TrainConfig
from kafjax.training.step import TrainState, new_state, shardings_of, state_shardings
from kafjax.training.task import place_frozen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LaneInputs:
    """Inputs that differ between lanes, beside their state. They are arrays, so that another mix
    needs no other program.

    `scales` `{kernel path: float32 [N, ..]}`; `peak_N` float32 learning rates; `warmup_N`,
    `steps_N` int32 of each schedule; `active_N` bool: an inactive lane keeps its state.
    """

    scales: Any
    peak_N: Any
    warmup_N: Any
    steps_N: Any
    active_N: Any


@dataclasses.dataclass(frozen=True)
class CompiledLanes:
    """The step, ready to run: `step(state, frozen, inputs, batch) -> (state, metrics)`; bytes on
    one device."""

    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    seconds: float
    argument_bytes: int
    temporary_bytes: int


def lane_losses(
    model: Decoder,
    frozen: trees.Tree,
    adapters: Any,
    scales: Mapping[str, jax.Array],
    batch: Batch,
    chunk: int,
    lane_shards: int = 1,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Returns the sum of all lanes' losses, to differentiate, and `(losses_N, weights_N)`, each
    lane's sums of token losses and weights.

    Args:
      batch: arrays with a leading axis of N lanes.
      chunk: most rows of logits alive at once, over all lanes of a device.
      lane_shards: N is split over so many devices.
    """

    def hidden(adapters, scales, tokens_BxT, positions_BxT, segments_BxT):
        return model.hidden(
            lora.lanes.attach(frozen, adapters, scales), tokens_BxT, positions_BxT, segments_BxT
        )[0]

    hidden_NxBxTxD = jax.vmap(hidden, spmd_axis_name="lane" if lane_shards > 1 else None)(
        adapters, scales, batch.tokens_BxT, batch.positions_BxT, batch.segments_BxT
    )
    N, S, P = batch.places_SxN.shape
    D = hidden_NxBxTxD.shape[-1]
    looked_at_NxSxPxD = jax.vmap(jax.vmap(lambda h, places: h[places]))(
        hidden_NxBxTxD.reshape(N, S, -1, D), batch.places_SxN
    )

    def grouped(x: Any) -> jax.Array:
        """Reshapes `[N, S, P, ..]` to `[groups, P x lanes of a device, ..]`: the part of a device
        stays there and is chunked together.

        Each lane's first places come first, so that places that are empty in all lanes are at the
        end.
        """
        x = jnp.moveaxis(x.reshape(lane_shards, N // lane_shards, *x.shape[1:]), 1, 3)
        return x.reshape(lane_shards * S, -1, *x.shape[4:])

    size = even_chunk(N // lane_shards * P, chunk)

    def group_losses(hidden_PxD, targets_P, weights_P):
        table, cap = model.unembedding(frozen), model.config.logit_cap
        return summed_and_single_losses(hidden_PxD, table, targets_P, weights_P, size, n_used, cap)

    groups = tuple(map(grouped, (looked_at_NxSxPxD, batch.targets_SxN, batch.weights_SxN)))
    n_used = used(groups[2])
    if lane_shards * S == 1:
        total, losses = group_losses(*(x[0] for x in groups))
    else:
        totals, losses = jax.vmap(group_losses)(*groups)
        total = jnp.sum(totals)
    losses_N = jnp.sum(losses.reshape(lane_shards, S, P, -1), axis=(1, 2)).reshape(N)
    return total, (losses_N, jnp.sum(batch.weights_SxN, axis=(1, 2)))


@dataclasses.dataclass(frozen=True)
class LaneTask:
    """`n_lanes` lanes padded to `shapes` beside one base, laid out on a mesh.

    Attributes:
      frozen: the base on the mesh, matrices in the model's dtype.
      abstract: shapes, dtypes and shardings of the `TrainState`, of which every array has a leading
        axis of lanes.
    """

    model: Decoder
    config: TrainConfig
    mesh: Mesh
    shapes: lora.lanes.PaddedShapes
    n_lanes: int
    frozen: trees.Tree
    abstract: TrainState

    @classmethod
    def build(
        cls,
        model: Decoder,
        params: trees.Tree,
        config: TrainConfig,
        mesh: Mesh,
        shapes: lora.lanes.PaddedShapes,
        n_lanes: int,
    ) -> LaneTask:
        """Raises `UserError` if the lanes do not divide over the mesh, the base does not fit it, or
        it has experts."""
        check_divides(n_lanes, mesh)
        if model.config.n_experts:  # JAX has no `vmap` of `ragged_dot` with one set of kernels
            raise UserError(
                "adapters beside a mixture of experts do not train in lanes; train them one by one (finetune)"
            )
        # by XLA, which splits the lanes' axis over devices by itself; a kernel cannot be split so
        model = dataclasses.replace(model, remat=config.remat, attention="xla")
        frozen = place_frozen(model, params, mesh)
        stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((n_lanes, *x.shape), x.dtype), shapes)
        axes = jax.tree.map(
            lambda names: ("lanes", *names),
            lora.axes(shapes, model.axes()),
            is_leaf=lambda x: isinstance(x, tuple),
        )
        optimizer = optimizer_of(config)
        state = jax.eval_shape(jax.vmap(lambda adapters: new_state(adapters, optimizer)), stacked)
        by_lane = NamedSharding(mesh, PartitionSpec("lane"))
        of_state = state_shardings(shardings(axes, stacked, mesh), state, mesh, counters=by_lane)
        abstract = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            state,
            of_state,
        )
        return cls(model, config, mesh, shapes, n_lanes, frozen, abstract)

    def empty(self) -> TrainState:
        """Returns the state of empty lanes."""

        def zeros() -> Any:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.abstract)

        return jax.jit(zeros, out_shardings=shardings_of(self.abstract))()

    def resized(self, n_lanes: int) -> LaneTask:
        """Returns the task for another number of lanes, with the same arrays of the base."""
        return LaneTask.build(self.model, self.frozen, self.config, self.mesh, self.shapes, n_lanes)

    @functools.cached_property
    def put(self) -> Callable[[TrainState, Any, TrainState], TrainState]:
        """`put(state, slot, lane_state)`: the state with one lane's (padded, without the leading
        axis) in a slot. `state` is donated."""

        def set_(state: Any, slot: Any, lane_state: Any) -> Any:
            return jax.tree.map(lambda all_, one: all_.at[slot].set(one), state, lane_state)

        return jax.jit(set_, out_shardings=shardings_of(self.abstract), donate_argnums=0)

    @property
    def lane_shards(self) -> int:
        return self.mesh.shape["lane"]

    def batch_sharding(self) -> NamedSharding:
        lead = () if self.config.accumulate == 1 else (None,)
        return NamedSharding(self.mesh, PartitionSpec(*lead, "lane", BATCH_AXES))

    def abstract_inputs(self, batch: Batch) -> tuple[LaneInputs, Batch]:
        """Returns the shapes to `compile` for, given the batch of one lane."""
        axis = 0 if self.config.accumulate == 1 else 1

        def stacked(x: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((*x.shape[:axis], self.n_lanes, *x.shape[axis:]), x.dtype)

        def lane(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((self.n_lanes, *shape), dtype)

        scales = {
            path: lane(jnp.float32, *pair["a"].shape[:-2]) for path, pair in self.shapes.items()
        }
        inputs = LaneInputs(
            scales, lane(jnp.float32), lane(jnp.int32), lane(jnp.int32), lane(jnp.bool_)
        )
        return inputs, jax.tree.map(stacked, batch)

    def shard_inputs(self, inputs: LaneInputs) -> LaneInputs:
        return shard(inputs, NamedSharding(self.mesh, PartitionSpec("lane")))

    def losses(
        self, state: TrainState, inputs: LaneInputs, batch: Batch
    ) -> tuple[jax.Array, jax.Array]:
        """Computes each lane's summed loss and weight on a batch, `[N]` both, without learning.
        Jitted."""
        return _losses(
            self.model,
            self.frozen,
            state.trainable,
            inputs.scales,
            batch,
            self.config.loss_chunk,
            self.lane_shards,
        )

    def compile(self, inputs: LaneInputs, batch: Batch) -> CompiledLanes:
        """Compiles the step for inputs and batches of these shapes (arrays or abstract)."""
        began = time.perf_counter()
        compiled = self.lower(inputs, batch).compile()
        seconds = time.perf_counter() - began
        memory: Any = compiled.memory_analysis()
        return CompiledLanes(
            compiled, seconds, memory.argument_size_in_bytes, memory.temp_size_in_bytes
        )

    def lower(self, inputs: LaneInputs, batch: Batch) -> jax.stages.Lowered:
        """Lowers the step for inputs and batches of these shapes, for the devices of the mesh."""

        def shapes(tree: Any) -> Any:
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)

        of_state = shardings_of(self.abstract)
        by_lane = NamedSharding(self.mesh, PartitionSpec("lane"))
        jitted = jax.jit(
            self._step,
            in_shardings=(of_state, shardings_of(self.frozen), by_lane, self.batch_sharding()),
            out_shardings=(of_state, replicated(self.mesh)),
            donate_argnums=0,
            compiler_options=compiler_options(self.model.constrain.platform),
        )
        return jitted.lower(self.abstract, self.frozen, shapes(inputs), shapes(batch))

    def _step(
        self, state: TrainState, frozen: trees.Tree, inputs: LaneInputs, batch: Batch
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        def summed(adapters, microbatch):
            return lane_losses(
                self.model,
                frozen,
                adapters,
                inputs.scales,
                microbatch,
                self.config.loss_chunk,
                self.lane_shards,
            )

        value_and_grad = jax.value_and_grad(summed, has_aux=True)

        def add(total, microbatch):
            return jax.tree.map(jnp.add, total, value_and_grad(state.trainable, microbatch)), None

        if self.config.accumulate == 1:
            (_, (losses_N, weights_N)), gradients = value_and_grad(state.trainable, batch)
        else:
            shapes = jax.eval_shape(
                value_and_grad, state.trainable, jax.tree.map(lambda x: x[0], batch)
            )
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            ((_, (losses_N, weights_N)), gradients), _ = jax.lax.scan(add, zeros, batch)
        weights_or_1_N = jnp.maximum(weights_N, 1e-9)

        def update(state, gradients, weight, peak, warmup, steps, active):
            gradients = jax.tree.map(lambda g: g / weight, gradients)

            def rate(count: Any) -> Any:
                return optimizers.rate(count, peak, warmup, steps, self.config.floor_fraction)

            updates, opt_state = optimizer_of(self.config, rate).update(
                gradients, state.opt_state, state.trainable
            )
            after = TrainState(
                state.step + 1, optax.apply_updates(state.trainable, updates), opt_state
            )
            after = jax.tree.map(lambda new, old: jnp.where(active, new, old), after, state)
            return after, optax.global_norm(gradients), jnp.float32(rate(state.step))

        after, norm_N, rate_N = jax.vmap(update)(
            state,
            gradients,
            weights_or_1_N,
            inputs.peak_N,
            inputs.warmup_N,
            inputs.steps_N,
            inputs.active_N,
        )
        return after, {
            "loss": losses_N / weights_or_1_N,
            "grad_norm": norm_N,
            "targets": weights_N,
            "learning_rate": rate_N,
        }


def optimizer_of(
    config: TrainConfig, rate: optax.Schedule = lambda step: step
) -> optax.GradientTransformation:
    """Optimizer of one lane. The state's structure does not depend on the rate."""
    return optimizers.make(
        config.optimizer,
        rate,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        lora_plus=config.lora_plus,
    )


def check_divides(n_lanes: int, mesh: Mesh) -> None:
    """Raises `UserError` if `n_lanes` do not divide over the `lane` axis of the mesh."""
    size = mesh.shape["lane"]
    if n_lanes < 1 or n_lanes % size:
        raise UserError(
            f"{n_lanes} lanes do not divide over mesh axis lane:{size}; use a multiple of {size}"
        )


def lanes_that_fit(task: LaneTask, batch: Batch, most: int) -> tuple[int, str]:
    """Returns the number of lanes that memory holds, and the reason in words.

    It is at most `most`, and deals them evenly over the rounds that `most` lanes need. The compiler
    tells the bytes of one lane (a device of the `lane` axis) and of two; four fifths of the free
    memory are filled.

    Args:
      task: a task of as few lanes as the mesh allows.
      batch: a batch of one lane.
    """
    unit, base = task.n_lanes, trees.n_bytes(task.frozen)
    programs = [
        (sized := task.resized(n)).compile(*sized.abstract_inputs(batch)) for n in (unit, 2 * unit)
    ]
    needs = [program.argument_bytes + program.temporary_bytes for program in programs]
    a_unit, free = max(needs[1] - needs[0], 1), free_bytes() * 4 // 5
    room = max(1, 1 + int((free - (needs[0] - base)) // a_unit)) * unit
    if room >= most:
        slots = -(-most // unit) * unit
        return slots, f"all of them; the {free / 1e9:.1f} GB that may be used would hold {room}"
    rounds = -(-most // room)
    slots = -(-most // (rounds * unit)) * unit
    held = f"the {free / 1e9:.1f} GB that may be used hold {room}, at {a_unit / unit / 1e9:.2f} GB a lane"
    return slots, f"{held}, so {most} lanes take {rounds} rounds"


def free_bytes() -> int:
    """Free bytes on the fullest accelerator of this process, or in the machine's memory where the
    runtime does not count."""
    counted = [
        stats
        for device in jax.local_devices()
        if (stats := device.memory_stats()) and "bytes_limit" in stats
    ]
    return min(
        (stats["bytes_limit"] - stats["bytes_in_use"] for stats in counted),
        default=psutil.virtual_memory().available,
    )


_losses = jax.jit(
    lambda model, frozen, adapters, scales, batch, chunk, lane_shards: lane_losses(
        model, frozen, adapters, scales, batch, chunk, lane_shards
    )[1],
    static_argnums=(0, 5, 6),
)
