"""Run by test_quantized.py in a process of its own, with eight fake devices: a quantised base split
over them."""

from __future__ import annotations

import dataclasses

import jax
from jax.sharding import PartitionSpec

from kafjax import lora
from kafjax.models import Decoder
from kafjax.ops.quantized import FORMATS, quantize_params
from kafjax.parallel import make_mesh, shardings
from kafjax.training.task import Task
from tests import compiling
from tests.training import multidevice_train as plain

MODEL = plain.MODEL = Decoder(dataclasses.replace(plain.CONFIG, hidden_size=128, mlp_size=64))
SPEC = lora.Spec(rank=4, alpha=8)


def main() -> None:
    mesh = make_mesh("data:2,fsdp:2,tensor:2")
    params = jax.jit(MODEL.init)(jax.random.key(0))
    for format in FORMATS:
        compiling.compile_quickly(format != "int8")  # one equality with the programs of a user
        base = quantize_params(params, format)
        mlp = Task.lora(MODEL, base, plain.TRAIN, mesh, 3, SPEC).frozen["layers"]["mlp"]
        up, down = mlp["up_proj"]["kernel"], mlp["down_proj"]["kernel"]
        assert up.values.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
        assert down.values.sharding.spec == PartitionSpec(None, "tensor", "fsdp")
        # Two tiles of 64 inputs are split as the kernel is; one of a column, or of 64 inputs in
        # all, is everywhere.
        assert up.scale.sharding.spec == PartitionSpec(
            None, "fsdp" if format == "nf4" else None, "tensor"
        )
        assert down.scale.sharding.spec == PartitionSpec(None, None, "fsdp")
        assert jax.tree.structure(shardings(MODEL.axes(), base, mesh)) == jax.tree.structure(base)
        print(f"{format} is split with its scales", flush=True)
        plain.equal(format, base, base, plain.TRAIN, SPEC, mesh)


if __name__ == "__main__":
    main()
