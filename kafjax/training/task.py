"""The trainable and frozen parts of a training, their placement on the mesh, and the step compiled
for them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from kafjax import lora
from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.lora import Spec
from kafjax.models import Decoder
from kafjax.ops.loss import even_chunk
from kafjax.ops.quantized import QuantizedKernel, refuse_quantized
from kafjax.parallel import Constrain, shard, shardings
from kafjax.training import optimizers
from kafjax.training.batches import Batch
from kafjax.training.config import TrainConfig
from kafjax.training.counted import flops as xla_flops
from kafjax.training.step import (
    Combine,
    TrainState,
    make_step,
    new_state,
    shardings_of,
    state_shardings,
)


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """The step ready to run, with XLA's figures: bytes on one device, FLOPs over all devices.

    Attributes:
      flops: FLOPs of one step without the products of the loss with the vocabulary.
      flops_a_place: FLOPs of those products for one place whose logits are computed.
    """

    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    seconds: float
    flops: float
    flops_a_place: float
    argument_bytes: int
    temporary_bytes: int


@dataclasses.dataclass(frozen=True)
class Task:
    """A model split into its trainable and its frozen part.

    Attributes:
      frozen: frozen parameters on the mesh, matrices in the model's dtype. From abstract `params`
        they are abstract: such a task can be compiled for devices that do not exist, but not run.
      make_trainable: returns the initial arrays, which the step may overwrite.
      finished: `finished(trainable)` returns the result of training: parameters, or adapters for
        the `params` of the task, and their spec.
      abstract: shapes, dtypes and shardings of the `TrainState`.
      donated: arrays whose memory the task takes over, of no use once there is a state.
    """

    model: Decoder
    config: TrainConfig
    mesh: Mesh
    combine: Combine
    frozen: trees.Tree
    make_trainable: Callable[[], Any]
    finished: Callable[[Any], tuple[Any, Spec | None]]
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    abstract: TrainState
    donated: tuple[jax.Array, ...] = ()

    @classmethod
    def full(
        cls,
        model: Decoder,
        params: trees.Tree,
        config: TrainConfig,
        mesh: Mesh,
        n_steps: int,
        donate: bool = False,
    ) -> Task:
        """Makes the task of full fine-tuning of `params`, without the embeddings (and an untied
        head) if `config.freeze_embedding`.

        The step overwrites its state: with `donate` the trainable part of `params`, else a copy of
        it. Raises `UserError` if they are quantised.
        """
        refuse_quantized(params, "full fine-tuning")
        initial, frozen = trees.partition(params, lambda path: _trains(config, path))

        def copy() -> Any:
            return initial if donate else jax.tree.map(jnp.copy, initial)

        def combine(trainable: Any, frozen: Any, key: Any) -> Any:
            return trees.combine(trainable, frozen)

        def finished(trainable: Any) -> tuple[Any, Spec | None]:
            return trainable, None

        task = cls._build(
            model,
            config,
            mesh,
            n_steps,
            combine=combine,
            frozen=frozen,
            make_trainable=copy,
            finished=finished,
            shapes=initial,
            trainable_axes=model.axes(),
        )
        return (
            dataclasses.replace(task, donated=tuple(jax.tree.leaves(initial))) if donate else task
        )

    @classmethod
    def lora(
        cls,
        model: Decoder,
        params: trees.Tree,
        config: TrainConfig,
        mesh: Mesh,
        n_steps: int,
        spec: Spec,
        start: Any = None,
    ) -> Task:
        """Makes the task of training a LoRA adapter, drawn from `config.seed` or going on from the
        adapters `start`, beside `params`, which may be quantised (`ops.quantized`).

        PiSSA and OLoRA train beside the residual base: a second copy of the adapted kernels. They
        cannot go on: what they have left is an ordinary adapter of twice the rank.

        Raises:
          UserError: `start` is none of `spec` for these `params`, or `spec` changes the base.
        """
        if start is not None:
            if spec.changes_base:
                raise UserError(
                    f"init={spec.init!r} cannot go on from an adapter; train it anew, or go on with init='lora'"
                )
            lora.check_adapters(params, start, spec)

        def attach(adapters: Any, base: Any, key: Any) -> Any:
            return lora.attach(base, adapters, spec, key)

        # One program: drawn kernel by kernel, each shape of a kernel would be compiled by itself,
        # seconds in all.
        program = jax.jit(
            lambda base: _cast_all(
                lora.init(spec, base, jax.random.key(config.seed)), jnp.dtype(config.param_dtype)
            )
        )
        shapes = lora.abstract(spec, params)
        initial = program(params) if spec.changes_base and not _is_abstract(params) else None

        def draw() -> Any:
            if start is not None:
                return jax.tree.map(jnp.copy, start)
            return program(params) if initial is None else jax.tree.map(jnp.copy, initial)

        def finished(adapters: Any) -> tuple[Any, Spec | None]:
            return (
                (adapters, spec)
                if initial is None
                else lora.plain(params, adapters, shard(initial, shardings_of(adapters)), spec)
            )

        return cls._build(
            model,
            config,
            mesh,
            n_steps,
            combine=attach,
            frozen=params if initial is None else lora.residual(params, initial, spec),
            make_trainable=draw,
            finished=finished,
            shapes=shapes,
            trainable_axes=lora.axes(shapes, model.axes()),
        )

    @classmethod
    def _build(
        cls,
        model: Decoder,
        config: TrainConfig,
        mesh: Mesh,
        n_steps: int,
        *,
        combine: Combine,
        frozen: trees.Tree,
        make_trainable: Callable[[], Any],
        finished: Callable[[Any], tuple[Any, Spec | None]],
        shapes: Any,
        trainable_axes: Any,
    ) -> Task:
        model = dataclasses.replace(model, remat=config.remat, constrain=Constrain(mesh))
        schedule = optimizers.warmup_cosine(
            config.learning_rate,
            n_steps,
            warmup_fraction=config.warmup_fraction,
            floor_fraction=config.floor_fraction,
        )
        dtype = jnp.dtype(config.param_dtype)
        optimizer = optimizers.make(
            config.optimizer,
            schedule,
            weight_decay=config.weight_decay,
            clip_norm=config.clip_norm,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            momentum_dtype=dtype,
            lora_plus=config.lora_plus,
        )

        def make() -> Any:
            return _cast_all(make_trainable(), dtype)

        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
        state = jax.eval_shape(lambda t: new_state(t, optimizer), shapes)
        abstract = shard(
            state, state_shardings(shardings(trainable_axes, shapes, mesh), state, mesh)
        )
        return cls(
            model,
            config,
            mesh,
            combine,
            place_frozen(model, frozen, mesh),
            make,
            finished,
            optimizer,
            schedule,
            abstract,
        )

    def new_state(self) -> TrainState:
        of_state = shardings_of(self.abstract)
        trainable = shard(self.make_trainable(), of_state.trainable)
        return jax.jit(
            lambda t: new_state(t, self.optimizer), out_shardings=of_state, donate_argnums=0
        )(trainable)

    def compile(self, batch: Batch) -> CompiledStep:
        """Compiles the step for batches of the shape of `batch`."""
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
        began = time.perf_counter()
        traced = self.trace(batch)
        lowered = traced.lower()
        compiled = lowered.compile()
        seconds = time.perf_counter() - began
        memory: Any = compiled.memory_analysis()
        return CompiledStep(
            compiled,
            seconds,
            *self._flops(batch, traced, lowered),
            memory.argument_size_in_bytes,
            memory.temp_size_in_bytes,
        )

    def trace(self, batch: Batch) -> jax.stages.Traced:
        """Traces the step for batches of the shape of `batch`, which may be abstract."""
        step = make_step(
            self.model,
            self.combine,
            self.optimizer,
            self.schedule,
            mesh=self.mesh,
            state_shardings=shardings_of(self.abstract),
            frozen_shardings=shardings_of(self.frozen),
            accumulate=self.config.accumulate,
            chunk=self.config.loss_chunk,
            seed=self.config.seed,
        )
        return step.trace(self.abstract, self.frozen, batch)

    def lower(self, batch: Batch) -> jax.stages.Lowered:
        """Lowers the step for batches of the shape of `batch`, which may be abstract, for the
        devices of the mesh."""
        return self.trace(batch).lower()

    def flops(self, batch: Batch) -> tuple[float, float]:
        """Computes the FLOPs of one step without the loss's products with the vocabulary, and those
        of one place of the loss.

        The first is XLA's count, over all devices; the second is a formula.
        """
        traced = self.trace(batch)
        return self._flops(batch, traced, traced.lower())

    def _flops(
        self, batch: Batch, traced: jax.stages.Traced, lowered: jax.stages.Lowered
    ) -> tuple[float, float]:
        counted = xla_flops(traced.jaxpr, lowered)
        table = (self.model.config.vocab_size, self.model.config.hidden_size)
        trains = any(x.shape == table for x in jax.tree.leaves(self.abstract.trainable))
        # logits, gradient of the hidden states, of the table
        a_place = 2.0 * (3 if trains else 2) * table[0] * table[1]
        n_sequence = self.mesh.shape["sequence"]
        *_, S, N = batch.places_SxN.shape
        # The loop of the loss counts once a microbatch, with one chunk a share: that is taken off.
        a_chunk = even_chunk(-(-N // n_sequence), self.config.loss_chunk) * S * n_sequence
        return counted - self.config.accumulate * a_chunk * a_place, a_place


def placement(
    model: Decoder,
    config: TrainConfig,
    mesh: Mesh,
    spec: Spec | None = None,
    stored: trees.Tree | None = None,
) -> trees.Tree:
    """Returns the dtype and sharding of each parameter in `train`. Parameters loaded so
    (`hub.load_params`) exist only once.

    Args:
      stored: abstract parameters with quantised kernels (`quantized.abstract`), if any.

    Raises `UserError` for a parameter that does not divide over the mesh.
    """
    params = model.abstract_params() if stored is None else stored
    if spec is None:
        trained = jnp.dtype(config.param_dtype)

        def kept(path: str, x: Any) -> Any:
            return (
                _cast(x, trained) if _trains(config, path) else _cast_frozen(path, x, model.dtype)
            )

        params = trees.map_with_path(kept, params)
    elif not spec.changes_base:  # else singular vectors are looked for, in float32
        return place_frozen(model, params, mesh)
    return shard(params, shardings(model.axes(), params, mesh))


def _trains(config: TrainConfig, path: str) -> bool:
    """True if full fine-tuning changes the parameter at `path`."""
    return not (
        config.freeze_embedding and path.startswith(("embed/", "head/", "per_layer/embed/"))
    )


def place_frozen(model: Decoder, frozen: trees.Tree, mesh: Mesh) -> trees.Tree:
    """Places frozen parameters on the mesh, cast once to the compute dtype. Norms compute in
    float32 and stay."""
    frozen = trees.map_with_path(lambda path, x: _cast_frozen(path, x, model.dtype), frozen)
    return shard(frozen, shardings(model.axes(), frozen, mesh))


def _cast_frozen(path: str, x: Any, dtype: Any) -> Any:
    return x if path.endswith(("scale", "bias")) else _cast(x, dtype)


def _cast(x: Any, dtype: Any) -> Any:
    if isinstance(x, QuantizedKernel):
        return x
    return (
        jax.ShapeDtypeStruct(x.shape, dtype)
        if isinstance(x, jax.ShapeDtypeStruct)
        else x.astype(dtype)
    )


def _cast_all(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: _cast(x, dtype), tree)


def _is_abstract(tree: Any) -> bool:
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))
