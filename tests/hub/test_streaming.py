"""Loading never holds the model on the host: memory is bounded by the largest tensor, and a device reads its own part."""

from __future__ import annotations

import dataclasses
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from kafjax import hub
from kafjax.core import trees
from kafjax.hub.assemble import write_layer
from kafjax.models import CONFIGS, Decoder
from tests.devices import on_eight_devices

pytestmark = pytest.mark.optimised


@pytest.mark.parametrize(("stored", "loaded"), [("float32", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")])
def test_the_host_holds_two_tensors_at_most(tmp_path, stored, loaded):
    """Numpy's and Python's memory is counted, the parameters' is not: that is the device's."""
    sizes = {"vocab_size": 4000, "hidden_size": 256, "mlp_size": 1024, "n_layers": 12, "n_heads": 4, "n_kv_heads": 2, "head_dim": 64}
    model = Decoder(dataclasses.replace(CONFIGS["llama3.1-8b"], **sizes, sliding=(False,) * 12, attention_scale=1 / 8, eos_id=1))
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.5, stored), model.abstract_params())
    hub.save(tmp_path / "saved", model, params, shard_bytes=10**7)
    largest = 4000 * 256 * jnp.dtype(stored).itemsize
    assert sum(leaf.nbytes for leaf in trees.flatten(params).values()) > 10 * largest
    load = lambda: hub.load(str(tmp_path / "saved"), param_dtype=jnp.dtype(loaded))[1]  # noqa: E731
    load()  # what is imported and compiled on first use is not the tensors'
    tracemalloc.start()
    try:
        params = jax.block_until_ready(load())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert largest < peak < 2.5 * largest  # the file's bytes are seen by this count
    assert all(leaf.dtype == loaded and bool((leaf == 0.5).all()) for leaf in trees.flatten(params).values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_is_written_where_the_parameter_lies(dtype):
    stacked, tensor = jax.ShapeDtypeStruct((16, 32, 64), dtype), jax.ShapeDtypeStruct((64, 32), dtype)
    memory = write_layer.lower(stacked, tensor, (0,), True).compile().memory_analysis()
    assert memory.alias_size_in_bytes == 16 * 32 * 64 * jnp.dtype(dtype).itemsize
    assert memory.temp_size_in_bytes <= 2 * 32 * 64 * 4


@pytest.mark.multiprocess
def test_eight_devices_load_what_one_does(tmp_path):
    assert on_eight_devices(Path(__file__).with_name("multidevice_load.py"), tmp_path) == [
        "equal to one device, and saved as it was",
        "a device reads its part only",
    ]
