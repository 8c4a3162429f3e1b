"""Run by test_multidevice.py in a process of its own, with eight fake devices."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from kafjax import lora
from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.models import Decoder
from kafjax.parallel import make_mesh, shardings
from kafjax.training import Example, TrainConfig, TrainResult, placement, train
from kafjax.training.task import Task
from tests.shapes import DIVISIBLE
from tests.variants import TOGETHER

CONFIG = DIVISIBLE
MODEL = Decoder(CONFIG)
TRAIN = TrainConfig(steps=3, batch_rows=8, seq_len=16, learning_rate=1e-3, freeze_embedding=False)


def examples() -> list[Example]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 15, 24)
    return [
        Example(
            rng.integers(1, 64, n).astype(np.int32), (np.arange(n) >= n // 3).astype(np.float32)
        )
        for n in lengths
    ]


def interrupt(**row) -> None:
    if row["step"] == 3:
        raise KeyboardInterrupt


def equal(
    name: str, params, whole, config: TrainConfig, spec: lora.Spec | None, mesh: Mesh
) -> TrainResult:
    """Trains on all devices and on one, and compares."""
    many = train(MODEL, params, [examples()], config, spec=spec, mesh=mesh)
    one = train(
        MODEL, whole, [examples()], config, spec=spec, mesh=make_mesh({}, devices=jax.devices()[:1])
    )
    assert many.targets == one.targets
    for row, expected in zip(many.curve, one.curve, strict=True):
        np.testing.assert_allclose(row["loss"], expected["loss"], rtol=1e-5)
        np.testing.assert_allclose(row["grad_norm"], expected["grad_norm"], rtol=1e-4)
    for ours, theirs in zip(
        jax.tree.leaves(many.trainable), jax.tree.leaves(one.trainable), strict=True
    ):
        assert ours.sharding.num_devices == 8
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    print(f"{name} equals one device", flush=True)
    return many


def own_bytes(array: jax.Array | jax.ShapeDtypeStruct) -> int:
    """Bytes of its part on one device."""
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


def held() -> int:
    """Bytes that are alive on the first device."""
    first = jax.devices()[0]
    return sum(
        own_bytes(array)
        for array in jax.live_arrays()
        if not array.is_deleted() and first in array.sharding.device_set
    )


def held_beside(mesh: Mesh, spec: lora.Spec | None, donate: bool) -> float:
    """Memory of a device during a training beside state and frozen parameters, in copies of the
    parameters."""
    before, seen = held(), []
    abstract = placement(MODEL, TRAIN, mesh, spec)
    params = jax.jit(MODEL.init, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))(
        jax.random.key(0)
    )
    train(
        MODEL,
        params,
        [examples()],
        TRAIN,
        spec=spec,
        mesh=mesh,
        donate=donate,
        log=lambda **row: seen.append(held()),
    )
    task = (
        Task.full(MODEL, abstract, TRAIN, mesh, 3)
        if spec is None
        else Task.lora(MODEL, abstract, TRAIN, mesh, 3, spec)
    )
    needed = sum(map(own_bytes, jax.tree.leaves((task.abstract, task.frozen))))
    return (max(seen) - before - needed) / sum(map(own_bytes, jax.tree.leaves(abstract)))


def parameters_are_held_once(mesh: Mesh) -> None:
    assert held_beside(mesh, None, donate=True) < 0.5
    assert held_beside(mesh, None, donate=False) > 1  # the check sees a copy
    assert held_beside(mesh, lora.Spec(4), donate=True) < 0.5
    print("parameters are held once", flush=True)


def main(folder: Path) -> None:
    assert jax.device_count() == 8
    mesh = make_mesh("data:2,fsdp:2,tensor:2")

    key = jax.random.key(0)
    abstract = MODEL.abstract_params()
    params = jax.jit(MODEL.init, out_shardings=shardings(MODEL.axes(), abstract, mesh))(key)
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 8, 12)}
    whole = jax.jit(MODEL.init)(key)
    for path, leaf in trees.flatten(whole).items():
        np.testing.assert_array_equal(leaf, trees.flatten(params)[path], err_msg=path)
    print("created sharded", flush=True)

    parameters_are_held_once(mesh)
    straight = equal("full", params, whole, TRAIN, None, mesh)
    for (name, spec), accumulate in zip(TOGETHER.items(), (2, 1), strict=True):
        equal(
            name,
            params,
            whole,
            dataclasses.replace(TRAIN, accumulate=accumulate, lora_plus=2.0),
            spec,
            mesh,
        )

    config = dataclasses.replace(TRAIN, checkpoint_every=2)
    try:
        train(MODEL, params, [examples()], config, mesh=mesh, run_dir=folder, log=interrupt)
    except KeyboardInterrupt:
        pass
    moved = train(
        MODEL, params, [examples()], config, mesh=make_mesh("data:4,tensor:2"), run_dir=folder
    )
    assert moved.curve[:2] == straight.curve[:2]
    np.testing.assert_allclose(moved.curve[2]["loss"], straight.curve[2]["loss"], rtol=1e-5)
    print("resumed on another mesh", flush=True)

    try:
        train(MODEL, params, [examples()], dataclasses.replace(TRAIN, batch_rows=6), mesh=mesh)
    except UserError as error:
        assert "multiple of 4" in str(error), error
        print("rows that do not divide are told", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
