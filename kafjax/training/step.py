"""One optimizer step: a pure function of (state, frozen parameters, batch), jitted, sharded, with
the state donated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kafjax.core import trees
from kafjax.core.programs import compiler_options
from kafjax.models import Decoder
from kafjax.parallel import BATCH_AXES, replicated
from kafjax.training import objective
from kafjax.training.optimizers import round_stochastically

Combine = Callable[[Any, trees.Tree, jax.Array], trees.Tree]
"""`combine(trainable, frozen, key) -> params`: what makes full fine-tuning, a frozen embedding and
LoRA one step. `key` draws the dropout of this step, or of one of its microbatches."""

Step = jax.stages.Wrapped
"""`step(state, frozen, batch) -> (state, metrics)`, jitted."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state that a step updates. `step` int32 counts the steps done."""

    step: jax.Array
    trainable: Any
    opt_state: Any


def new_state(trainable: Any, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.int32(0), trainable, optimizer.init(_float32(trainable)))


def state_shardings(
    trainable_shardings: Any,
    abstract: TrainState,
    mesh: Mesh,
    counters: NamedSharding | None = None,
) -> TrainState:
    """Returns the shardings of a whole state.

    Moments are sharded as their parameters. Adafactor's row and column means keep the sharding of
    their remaining axes. Counters are replicated, or sharded by `counters`."""
    counters = replicated(mesh) if counters is None else counters
    by_path = dict(jax.tree_util.tree_leaves_with_path(trainable_shardings))
    shapes = {
        path: leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(abstract.trainable)
    }

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        of = next((path[start:] for start in range(len(path)) if path[start:] in by_path), None)
        if of is None:
            return counters
        shape, spec = (
            shapes[of],
            (*by_path[of].spec, *(None,) * (len(shapes[of]) - len(by_path[of].spec))),
        )
        if leaf.shape == shape:
            return by_path[of]
        name = jax.tree_util.keystr(path[: -len(of)])
        if len(shape) < 2:
            return counters  # a vector, which Adafactor does not factor
        layers = range(len(shape) - 2)
        for suffix, kept in ((".v_row", (*layers, -2)), (".v_col", (*layers, -1))):
            if name.endswith(suffix) and leaf.shape == tuple(shape[i] for i in kept):
                return NamedSharding(mesh, PartitionSpec(*(spec[i] for i in kept)))
        return counters

    everywhere: Any = counters  # a state of shardings in place of arrays
    return TrainState(
        everywhere,
        trainable_shardings,
        jax.tree_util.tree_map_with_path(sharding, abstract.opt_state),
    )


def shardings_of(tree: Any) -> Any:
    """Returns the sharding of each array of a tree."""
    return jax.tree.map(lambda x: x.sharding, tree)


def batch_sharding(mesh: Mesh, accumulate: int = 1) -> NamedSharding:
    """Sharding of every array of a `Batch`: rows, with their groups of targets, over `data` and
    `fsdp`. Tokens are a few bytes each and are split over `sequence` inside the step."""
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
    seed: int = 0,
) -> Step:
    """Builds `step(state, frozen, batch) -> (state, metrics)`.

    The gradient is that of the weighted mean loss over the whole batch, however many microbatches
    it comes in, and is taken with respect to `state.trainable` only. `state` is donated: its
    buffers are gone after the call. Gradients and updates are float32; bfloat16 parameters are
    updated with stochastic rounding. Rounding and dropout are drawn from `seed` and the step, so
    that a resumed training repeats the uninterrupted one.

    Metrics, float32 scalars: `loss` (nats per weighted token), `grad_norm` (before clipping),
    `targets` (sum of the weights), `loss_places` (places whose logits were computed),
    `learning_rate`.
    """

    def summed_loss(trainable, frozen, batch, key):
        params = combine(trainable, frozen, key)
        return objective.loss(
            model, compute_copy(params, model.dtype), batch, chunk, mesh.shape["sequence"]
        )

    value_and_grad = jax.value_and_grad(summed_loss, has_aux=True)

    def accumulated(trainable, frozen, batch, key):
        def add(total, xs):
            return jax.tree.map(jnp.add, total, value_and_grad(trainable, frozen, *xs)), None

        zeros = (
            (jnp.float32(0), jnp.float32(0)),
            jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trainable),
        )
        return jax.lax.scan(add, zeros, (batch, jax.random.split(key, accumulate)))[0]

    def step(state, frozen, batch):
        dropping, rounding = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
        gradients_of = value_and_grad if accumulate == 1 else accumulated
        (total, weight), gradients = gradients_of(state.trainable, frozen, batch, dropping)
        micro_weights = batch.weights_SxN.reshape(-1, *batch.weights_SxN.shape[-2:])
        places = jax.vmap(lambda w: objective.computed_places(w, chunk, mesh.shape["sequence"]))(
            micro_weights
        )
        weight_or_1 = jnp.maximum(weight, 1e-9)
        gradients = jax.tree.map(lambda g: g.astype(jnp.float32) / weight_or_1, gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, _float32(state.trainable))
        trainable = _updated(state.trainable, updates, rounding)
        metrics = {
            "loss": total / weight_or_1,
            "grad_norm": optax.global_norm(gradients),
            "targets": weight,
            "loss_places": jnp.sum(places).astype(jnp.float32),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        return TrainState(state.step + 1, trainable, opt_state), metrics

    return jax.jit(
        step,
        in_shardings=(state_shardings, frozen_shardings, batch_sharding(mesh, accumulate)),
        out_shardings=(state_shardings, replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler_options(model.constrain.platform),
    )


def compute_copy(params: trees.Tree, dtype: Any) -> trees.Tree:
    """Casts plain kernels to the compute dtype. Done once here and not at each use, so that devices
    exchange the small copy of a sharded kernel, and a loop over layers reads it in place."""

    def cast(path: str, leaf: Any) -> Any:
        return (
            leaf.astype(dtype)
            if path.endswith(("/kernel", "_experts")) and isinstance(leaf, jax.Array)
            else leaf
        )

    return trees.map_with_path(cast, params)


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _updated(trainable: Any, updates: Any, key: jax.Array) -> Any:
    leaves, structure = jax.tree.flatten(trainable)
    keys = (
        jax.random.split(key, len(leaves))
        if any(x.dtype == jnp.bfloat16 for x in leaves)
        else [None] * len(leaves)
    )

    def add(x: jax.Array, update: jax.Array, key: Any) -> jax.Array:
        return (
            round_stochastically(x.astype(jnp.float32) + update, key)
            if x.dtype == jnp.bfloat16
            else x + update
        )

    added = [
        add(x, update, k)
        for x, update, k in zip(leaves, jax.tree.leaves(updates), keys, strict=True)
    ]
    return jax.tree.unflatten(structure, added)
