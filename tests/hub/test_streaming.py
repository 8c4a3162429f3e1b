"""Loading never holds the model on the host: memory is bounded by the largest tensor, and a device
reads its own part."""

from __future__ import annotations

import dataclasses
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kafjax import hub
from kafjax.core import trees
from kafjax.hub import safetensors_in
from kafjax.hub.assemble import write_layer
from kafjax.models import CONFIGS, Decoder
from kafjax.ops import quantized
from tests import compiling
from tests.devices import on_eight_devices


@pytest.mark.parametrize(
    ("stored", "loaded"), [("float32", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_the_host_holds_two_tensors_at_most(tmp_path, stored, loaded):
    """Numpy's and Python's memory is counted, the parameters' is not: that is the device's."""
    sizes = {
        "vocab_size": 4000,
        "hidden_size": 256,
        "mlp_size": 1024,
        "n_layers": 12,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 64,
    }
    model = Decoder(
        dataclasses.replace(
            CONFIGS["llama3.1-8b"], **sizes, sliding=(False,) * 12, attention_scale=1 / 8, eos_id=1
        )
    )
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.5, stored), model.abstract_params())
    hub.save(tmp_path / "saved", model, params, shard_bytes=10**7)
    largest = 4000 * 256 * jnp.dtype(stored).itemsize
    assert sum(leaf.nbytes for leaf in trees.flatten(params).values()) > 10 * largest

    def load():
        return hub.load(str(tmp_path / "saved"), param_dtype=jnp.dtype(loaded))[1]

    load()  # what is imported and compiled on first use is not the tensors'
    tracemalloc.start()
    try:
        params = jax.block_until_ready(load())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert largest < peak < 2.5 * largest  # the file's bytes are seen by this count
    assert all(
        leaf.dtype == loaded and bool((leaf == 0.5).all())
        for leaf in trees.flatten(params).values()
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    """A Llama of twelve layers in float32: 3.1 million parameters in blocks, 1 million in each
    embedding."""
    sizes = {
        "vocab_size": 4000,
        "hidden_size": 256,
        "mlp_size": 1024,
        "n_layers": 12,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 64,
    }
    model = Decoder(
        dataclasses.replace(
            CONFIGS["llama3.1-8b"], **sizes, sliding=(False,) * 12, attention_scale=1 / 8, eos_id=1
        )
    )
    leaves = trees.flatten(model.abstract_params())
    keys = dict(zip(leaves, jax.random.split(jax.random.key(0), len(leaves)), strict=True))
    params = trees.unflatten(
        {path: jax.random.normal(keys[path], leaf.shape) for path, leaf in leaves.items()}
    )
    folder = tmp_path_factory.mktemp("models") / "saved"
    hub.save(folder, model, params)
    return str(folder)


@pytest.mark.parametrize("format", quantized.FORMATS)
def test_a_quantised_base_is_what_quantising_the_floats_gives_and_its_floats_are_never_all_in_memory(
    saved, format
):
    model, params = hub.load(saved)
    expected = quantized.quantize_params(params, format)
    n_floats = sum(leaf.nbytes for leaf in trees.flatten(params).values())
    n_integers = sum(leaf.nbytes for leaf in jax.tree.leaves(expected))
    largest = max(
        leaf.nbytes for path, leaf in trees.flatten(params).items() if not path.endswith("kernel")
    )
    del params
    abstract = quantized.abstract(model.abstract_params(), format)
    most = 0

    def watched(tensors):
        nonlocal most
        for pair in tensors:
            most = max(most, sum(array.nbytes for array in jax.live_arrays()) - before)
            yield pair

    before = sum(array.nbytes for array in jax.live_arrays())
    with pytest.MonkeyPatch.context() as patch:
        read = safetensors_in.read_tensors
        patch.setattr(safetensors_in, "read_tensors", lambda folder: watched(read(folder)))
        loaded = hub.load_params(saved, abstract)
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)
    assert most < n_integers + 2 * largest < n_floats


@pytest.mark.optimised  # the optimisations determine the memory of a program
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_is_written_where_the_parameter_lies(dtype):
    stacked, tensor = (
        jax.ShapeDtypeStruct((16, 32, 64), dtype),
        jax.ShapeDtypeStruct((64, 32), dtype),
    )
    memory = compiling.memory_of(write_layer.lower(stacked, tensor, (0,), True))
    assert memory.alias_size_in_bytes == 16 * 32 * 64 * jnp.dtype(dtype).itemsize
    assert memory.temp_size_in_bytes <= 2 * 32 * 64 * 4


@pytest.mark.multiprocess
def test_eight_devices_load_what_one_does(tmp_path):
    assert on_eight_devices(Path(__file__).with_name("multidevice_load.py"), tmp_path) == [
        "equal to one device, and saved as it was",
        "a device reads its part only",
    ]
