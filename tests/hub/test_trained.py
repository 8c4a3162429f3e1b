"""Results of full fine-tuning: written in one file or in shards, and read back into the dtypes and
shardings of a model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.hub import load_trained, save_trained


@pytest.fixture(scope="module")
def params() -> trees.Tree:
    rng = np.random.default_rng(0)

    def array(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "embed": {"embedding": array(6, 4)},
        "layers": {"norm": {"scale": array(3, 4)}, "up": {"kernel": array(3, 4, 8)}},
    }


@pytest.fixture
def trained(params) -> trees.Tree:
    return {"layers": jax.tree.map(lambda x: x + 1, params["layers"])}


@pytest.mark.parametrize("shard_bytes", [100, 5_000_000])
def test_what_was_trained_comes_back_and_the_rest_is_the_models(
    params, trained, tmp_path, shard_bytes
):
    kept = save_trained(tmp_path, trained, shard_bytes=shard_bytes)
    files = sorted(file.name for file in tmp_path.iterdir())
    assert files == ["weights.safetensors"] or (
        len(files) == 3 and "weights.safetensors.index.json" in files
    ), files
    assert (len(files) == 3) == (shard_bytes == 100)
    assert kept == sum(file.stat().st_size for file in tmp_path.iterdir()) >= trees.n_bytes(trained)
    loaded = trees.flatten(load_trained(tmp_path, params))
    for path, expected in trees.flatten({**params, **trained}).items():
        np.testing.assert_array_equal(loaded[path], expected, err_msg=path)
    assert loaded["embed/embedding"] is params["embed"]["embedding"]


def test_arrays_come_in_the_dtype_of_those_they_replace_whose_values_may_be_gone(
    params, trained, tmp_path
):
    save_trained(tmp_path, trained)
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    low["layers"]["up"]["kernel"].delete()
    loaded = load_trained(tmp_path, low)["layers"]["up"]["kernel"]
    assert loaded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(loaded, trained["layers"]["up"]["kernel"].astype(jnp.bfloat16))


def test_shards_of_an_earlier_attempt_are_gone(params, trained, tmp_path):
    save_trained(tmp_path, params, shard_bytes=100)
    save_trained(tmp_path, trained)
    assert [file.name for file in tmp_path.iterdir()] == ["weights.safetensors"]


def test_weights_of_another_model_are_named(params, trained, tmp_path):
    save_trained(tmp_path, trained)
    other = {"layers": {"norm": params["layers"]["norm"], "up": {"kernel": jnp.zeros((3, 4, 9))}}}
    with pytest.raises(
        UserError,
        match=r"'layers/up/kernel' is of shape \[3, 4, 8\], the model has \[3, 4, 9\] there",
    ):
        load_trained(tmp_path, other)
    with pytest.raises(
        UserError, match=r"'layers/norm/scale' is of shape .* the model has no such parameter"
    ):
        load_trained(tmp_path, {"layers": {"up": params["layers"]["up"]}})


def test_a_damaged_file_is_named(params, trained, tmp_path):
    save_trained(tmp_path, trained)
    file = tmp_path / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"weights\.safetensors: damaged or truncated"):
        load_trained(tmp_path, params)
