"""Programs compiled for devices that are not there: a training step, one of many lanes, and prefill
and decoding, with abstract weights."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from kafjax import lora
from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.generation import decode
from kafjax.generation.sample import Sampling
from kafjax.models import Cache, Decoder
from kafjax.parallel import BATCH_AXES, Constrain, n_data_shares
from kafjax.parallel.chips import Slice, chip_of
from kafjax.parallel.hlo import Collective, collectives
from kafjax.training import Batch, TrainConfig
from kafjax.training.lane_step import LaneTask
from kafjax.training.task import Task, place_frozen


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Report of the compiler. Bytes are those of one device. `used` and `limit` are set where it
    refused; `refusal` has its words."""

    seconds: float
    arguments: int = 0
    temporaries: int = 0
    outputs: int = 0
    aliased: int = 0
    host: int = 0
    flops_once: float = 0.0
    collectives: tuple[Collective, ...] = ()
    refusal: str = ""
    used: float = 0.0
    limit: float = 0.0

    @property
    def fits(self) -> bool:
        return not self.refusal

    @property
    def n_bytes(self) -> float:
        """Bytes held at once. Outputs that share memory with arguments count once."""
        return self.used or self.arguments + self.temporaries + self.outputs - self.aliased


def devices_of(pod: Slice) -> list[Any] | None:
    """Devices to compile for: those of a TPU topology, the GPUs of this machine if they are these;
    None if only formulas can tell.

    Raises `UserError` if libtpu is not installed, or does not know the topology.
    """
    if not pod.is_tpu:
        here = [device for device in jax.devices() if device.platform == "gpu"]
        return here if len(here) == pod.n_devices and chip_of(here[0]) == pod.device else None
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "the TPU compiler is not installed; run: pip install 'kafjax[tpu]' (a wheel of 0.2 GB, no TPU needed), or add --formula"
        )
    # it is not for a TPU, so several processes may have it
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # else it asks the cloud's metadata server which TPU this machine is
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # A host holds a plane of four chips; of a shape without one, single chips.
    plane = (2, 2, 1) if all(n % 2 == 0 for n in pod.shape[:2]) else (1, 1, 1)
    options = {"chips_per_host_bounds": plane} | (
        {"chip_config_name": "megacore"} if pod.chip.compiler == "v4" else {}
    )
    shape = "x".join(map(str, pod.shape))
    try:
        named = {
            "platform": "tpu",
            "topology_name": f"{pod.chip.compiler}:{shape}",
            "num_slices": pod.n_slices,
        }
        found = topologies.get_topology_desc(**named, **options).devices
    except Exception as error:  # the compiler raises nothing narrower
        raise UserError(
            f"topology '{pod.name}': the TPU compiler refuses {pod.chip.compiler}:{shape} ({error})"
        ) from error
    return list(found)


def training_task(
    model: Decoder, config: TrainConfig, mesh: jax.sharding.Mesh, spec: lora.Spec | None
) -> Task:
    """The task that `training.train` would build, without weights."""
    # of the learning rate's schedule, whose numbers do not change the program
    params, n_steps = model.abstract_params(), 1000
    return (
        Task.full(model, params, config, mesh, n_steps)
        if spec is None
        else Task.lora(model, params, config, mesh, n_steps, spec)
    )


def training_batch(config: TrainConfig, mesh: jax.sharding.Mesh) -> Batch:
    """The shape of a batch full of tokens that the loss all looks at."""
    rows, shares = config.batch_rows // config.accumulate, n_data_shares(mesh)
    lead = () if config.accumulate == 1 else (config.accumulate,)
    tokens = jax.ShapeDtypeStruct((*lead, rows, config.seq_len), jnp.int32)
    places = jax.ShapeDtypeStruct((*lead, shares, rows // shares * config.seq_len), jnp.int32)
    return Batch(
        tokens, tokens, tokens, places, places, jax.ShapeDtypeStruct(places.shape, jnp.float32)
    )


def lower_training(
    model: Decoder, config: TrainConfig, mesh: jax.sharding.Mesh, spec: lora.Spec | None
) -> jax.stages.Lowered:
    return training_task(model, config, mesh, spec).lower(training_batch(config, mesh))


def lower_lanes(
    model: Decoder, config: TrainConfig, mesh: jax.sharding.Mesh, spec: lora.Spec, lanes: int
) -> jax.stages.Lowered:
    """The step of `lanes` adapters at once, each on a batch of its own."""
    params = model.abstract_params()
    task = LaneTask.build(
        model, params, config, mesh, lora.lanes.padded_shapes([spec], params), lanes
    )
    return task.lower(*task.abstract_inputs(training_batch(config, mesh)))


def _serving_params(model: Decoder, mesh: jax.sharding.Mesh) -> trees.Tree:
    """Weights as they are served: kernels and embedding in the dtype that is computed in."""
    return place_frozen(model, model.abstract_params(), mesh)


def _on(
    mesh: jax.sharding.Mesh, shape: tuple[int, ...], dtype: Any = jnp.int32, *axes: Any
) -> jax.ShapeDtypeStruct:
    spec = jax.sharding.PartitionSpec(*axes)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(mesh, spec))


def _cache(model: Decoder, mesh: jax.sharding.Mesh, rows: int, slots: int) -> Cache:
    def placed(block: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        heads = "tensor" if block.shape[3] % mesh.shape["tensor"] == 0 else None
        return _on(mesh, block.shape, block.dtype, None, BATCH_AXES, None, heads, None)

    return jax.tree.map(placed, model.cache_shapes(rows, slots))


def lower_prefill(
    model: Decoder, mesh: jax.sharding.Mesh, rows: int, length: int
) -> jax.stages.Lowered:
    """Prompts of `length` tokens, at once."""
    model = dataclasses.replace(model, constrain=Constrain(mesh))
    tokens, lengths, start = _on(mesh, (rows, length)), _on(mesh, (rows,)), _on(mesh, ())
    return decode.prefill.on(model.constrain.platform).lower(
        model, _serving_params(model, mesh), tokens, lengths, None, start, n_free=0
    )


def lower_decode(
    model: Decoder, mesh: jax.sharding.Mesh, rows: int, slots: int
) -> jax.stages.Lowered:
    """The loop that writes a token a turn, with a cache of `slots` positions that is updated in
    place."""
    model = dataclasses.replace(model, constrain=Constrain(mesh))
    key = jax.eval_shape(
        lambda: jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(rows))
    )
    row = functools.partial(_on, mesh, (rows,))
    state = decode.State(
        _on(mesh, (rows, decode.STRIDE)), _on(mesh, ()), row(), row(jnp.bool_), row(key.dtype)
    )
    cache, stops = (
        _cache(model, mesh, rows, slots),
        _on(mesh, (model.config.vocab_size,), jnp.bool_),
    )
    sampling = Sampling(max_new_tokens=decode.STRIDE).distribution()
    return decode.decode.on(model.constrain.platform).lower(
        model, _serving_params(model, mesh), state, cache, stops, _on(mesh, ()), sampling
    )


def compiled(lower: Callable[[], jax.stages.Lowered]) -> Compiled:
    """Lowers and compiles, and reads off what the compiler found. That it does not fit is an
    answer, not an error."""
    began = time.perf_counter()
    lowered = lower()
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text or "hbm" not in text.lower():
            raise
        used, limit = _figures(text)
        return Compiled(
            time.perf_counter() - began,
            refusal=" ".join(text.split("\n\n")[0].split()),
            used=used,
            limit=limit,
        )
    memory = program.memory_analysis()
    return Compiled(
        time.perf_counter() - began,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        host=memory.host_temp_size_in_bytes,
        flops_once=float(program.cost_analysis().get("flops", 0.0)),
        collectives=tuple(collectives(program.as_text())),
    )


def _figures(text: str) -> tuple[float, float]:
    """(used, limit) in bytes from the compiler's `Used 17.12G of 15.75G hbm`, or `temporaries
    (888.11G) exceeds available HBM (15.75G)`; zeros where it does not say."""
    size = r"([\d.]+)([KMGT])"
    found = re.search(rf"[Uu]sed {size} of {size}", text) or re.search(
        rf"\({size}\) exceeds available HBM \({size}\)", text
    )
    unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return (
        (float(found[1]) * unit[found[2]], float(found[3]) * unit[found[4]])
        if found
        else (0.0, 0.0)
    )
