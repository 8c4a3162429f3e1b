"""One optimizer step: a pure function of (state, frozen parameters, batch), jitted, sharded, with the state donated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kafjax.core import trees
from kafjax.models import Decoder
from kafjax.parallel import BATCH_AXES, replicated
from kafjax.training import objective

Combine = Callable[[Any, trees.Tree], trees.Tree]
"""`combine(trainable, frozen) -> params`: what makes full fine-tuning, a frozen embedding and LoRA one step."""

Step = Callable[..., tuple["TrainState", dict[str, jax.Array]]]
"""`step(state, frozen, batch) -> (state, metrics)`, jitted or compiled."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes. `step` int32 counts the steps done."""

    step: jax.Array
    trainable: Any
    opt_state: Any


def new_state(trainable: Any, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.int32(0), trainable, optimizer.init(trainable))


def state_shardings(
    trainable_shardings: Any,
    abstract: TrainState,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    counters: NamedSharding | None = None,
) -> TrainState:
    """Shardings of a whole state: moments lie with their parameters, counters everywhere, or where `counters` says."""
    counters = replicated(mesh) if counters is None else counters
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        abstract.opt_state,
        trainable_shardings,
        transform_non_params=lambda _: counters,
    )
    return TrainState(counters, trainable_shardings, opt_state)


def batch_sharding(mesh: Mesh, accumulate: int = 1) -> NamedSharding:
    """Rows (and the groups of targets that belong to them) over `data` and `fsdp`; the same for every array of a `Batch`."""
    rows = PartitionSpec(BATCH_AXES) if accumulate == 1 else PartitionSpec(None, BATCH_AXES)
    return NamedSharding(mesh, rows)


def make_step(
    model: Decoder,
    combine: Combine,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    mesh: Mesh,
    state_shardings: TrainState,
    frozen_shardings: Any,
    accumulate: int = 1,
    chunk: int = 256,
) -> Step:
    """Builds `step(state, frozen, batch) -> (state, metrics)`.

    The gradient is that of the weighted mean loss over the whole batch, however many microbatches it comes in, and is taken with
    respect to `state.trainable` only. `state` is donated: its buffers are gone after the call.

    Metrics, float32 scalars: `loss` (nats per weighted token), `grad_norm` (before clipping), `targets` (sum of the weights),
    `learning_rate`.
    """

    def summed_loss(trainable, frozen, batch):
        return objective.loss(model, combine(trainable, frozen), batch, chunk)

    value_and_grad = jax.value_and_grad(summed_loss, has_aux=True)

    def accumulated(trainable, frozen, batch):
        def add(total, microbatch):
            return jax.tree.map(jnp.add, total, value_and_grad(trainable, frozen, microbatch)), None

        zeros = ((jnp.float32(0), jnp.float32(0)), jax.tree.map(jnp.zeros_like, trainable))
        return jax.lax.scan(add, zeros, batch)[0]

    def step(state, frozen, batch):
        gradients_of = value_and_grad if accumulate == 1 else accumulated
        (total, weight), gradients = gradients_of(state.trainable, frozen, batch)
        weight_or_1 = jnp.maximum(weight, 1e-9)
        gradients = jax.tree.map(lambda g: g / weight_or_1, gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = {
            "loss": total / weight_or_1,
            "grad_norm": optax.global_norm(gradients),
            "targets": weight,
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        return TrainState(state.step + 1, trainable, opt_state), metrics

    return jax.jit(
        step,
        in_shardings=(state_shardings, frozen_shardings, batch_sharding(mesh, accumulate)),
        out_shardings=(state_shardings, replicated(mesh)),
        donate_argnums=0,
    )
