"""Adapters on disk: they come back as they were, and a file that is not one, or not for this base,
is said in one line."""

from __future__ import annotations

import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from kafjax import lora
from kafjax.core.errors import UserError

SPEC = lora.Spec(rank=2, alpha=3.5, targets=r"(q|up)_proj")
SHAPES = {
    "layers": {
        "attn": {"q_proj": {"kernel": (3, 8, 12)}},
        "mlp": {"up_proj": {"kernel": (3, 8, 20)}},
    },
    "embed": {"embedding": (50, 8)},
}
PARAMS = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s, jnp.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
)
UP = "layers/mlp/up_proj/kernel"


@pytest.fixture
def adapters():
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.array(rng.standard_normal(x.shape, np.float32)), lora.abstract(SPEC, PARAMS)
    )


@pytest.fixture
def path(tmp_path, adapters):
    path = tmp_path / "run" / "adapters.safetensors"
    lora.save(path, adapters, SPEC)
    return path


def load_error(path, params=PARAMS) -> str:
    with pytest.raises(UserError) as caught:
        lora.load(path, params)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def rewrite(path, tensors=lambda t: t, metadata=lambda m: m):
    with safetensors.safe_open(path, framework="numpy") as file:
        held = file.metadata()
    safetensors.numpy.save_file(tensors(safetensors.numpy.load_file(path)), path, metadata(held))


def test_what_is_saved_comes_back_bit_for_bit(path, adapters):
    loaded, spec = lora.load(path, PARAMS)
    assert spec == SPEC
    assert jax.tree.structure(loaded) == jax.tree.structure(adapters)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapters)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    size = sum(4 * x.size for x in jax.tree.leaves(adapters))
    assert size < path.stat().st_size < size + 2000  # the adapter and nothing else


def test_a_truncated_file_is_said(path):
    data = path.read_bytes()
    for keep in (0, 5, 200, len(data) - 1):
        path.write_bytes(data[:keep])
        assert "damaged or truncated" in load_error(path)


def test_a_pickle_is_not_opened(path):
    path.write_bytes(pickle.dumps({"layers": [1, 2, 3]}))
    assert "damaged or truncated" in load_error(path)


def test_no_file(tmp_path):
    assert "no adapter at" in load_error(tmp_path / "none.safetensors")
    assert "no adapter at" in load_error(tmp_path)


def test_safetensors_of_something_else_are_refused(path):
    rewrite(path, metadata=lambda m: None)
    assert "not an adapter that kafjax wrote" in load_error(path)
    rewrite(path, metadata=lambda m: {"format": "pt"})
    assert "'pt'" in load_error(path)


@pytest.mark.parametrize(
    "spec",
    [
        None,
        "{",
        "[]",
        '"x"',
        '{"rank": 2, "alpha": 1.0, "targets": "q", "colour": 0.1}',
        '{"rank": 0}',
        '{"alpha": NaN}',
    ],
)
def test_a_spec_that_cannot_be_read_is_refused(path, spec):
    """A key that this version does not know is refused too, never ignored."""
    rewrite(
        path, metadata=lambda m: {"format": m["format"]} | ({} if spec is None else {"spec": spec})
    )
    assert "its spec cannot be read" in load_error(path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none_are_named(path, adapters, value):
    def spoil(tensors):
        tensors[f"{UP}/b"][1, 0, 3] = value
        return tensors

    rewrite(path, spoil)
    assert f"'{UP}/b' holds NaN or infinity" in load_error(path)


def test_an_adapter_with_nan_is_not_saved_and_the_old_file_stays(path, adapters):
    before = path.read_bytes()
    spoiled = {**adapters, UP: {**adapters[UP], "a": adapters[UP]["a"].at[0, 0, 0].set(jnp.nan)}}
    with pytest.raises(UserError, match=f"'{UP}/a' holds NaN"):
        lora.save(path, spoiled, SPEC)
    assert path.read_bytes() == before


def test_another_base_is_said(path):
    other = jax.tree.map(lambda x: x, PARAMS)
    other["layers"]["mlp"]["up_proj"]["kernel"] = jax.ShapeDtypeStruct((3, 8, 21), jnp.float32)
    assert f"'{UP}/b' has shape [3, 2, 20]" in load_error(path, other)
    other["layers"]["mlp"] = {
        "gate_proj": {"kernel": jax.ShapeDtypeStruct((3, 8, 20), jnp.float32)}
    }
    assert f"'{UP}', which is no target of this base" in load_error(path, other)
    assert "match no kernel" in load_error(path, {"embed": PARAMS["embed"]})


def test_tensors_that_do_not_belong_or_lack_are_named(path):
    rewrite(path, lambda t: {name: x for name, x in t.items() if name != f"{UP}/b"})
    assert f"holds ['a'] for '{UP}'" in load_error(path)
    rewrite(
        path,
        lambda t: {
            **t,
            f"{UP}/b": np.zeros((3, 2, 20), np.float32),
            f"{UP}/c": np.zeros(1, np.float32),
        },
    )
    assert f"holds ['a', 'b', 'c'] for '{UP}'" in load_error(path)


def test_other_dtypes_in_a_file_are_taken_as_float32(path, adapters):
    rewrite(path, lambda t: {name: x.astype(np.float16) for name, x in t.items()})
    loaded, _ = lora.load(path, PARAMS)
    assert {x.dtype for x in jax.tree.leaves(loaded)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(loaded[UP]["a"], adapters[UP]["a"], rtol=1e-3)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path, adapters):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        lora.save(tmp_path / "file" / "adapters.safetensors", adapters, SPEC)


def test_the_metadata_is_plain_json(path):
    with safetensors.safe_open(path, framework="numpy") as file:
        assert (
            json.loads(file.metadata()["spec"]).items()
            >= {"rank": 2, "alpha": 3.5, "targets": r"(q|up)_proj"}.items()
        )
