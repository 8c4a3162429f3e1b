from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from kafjax import lora
from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.models import Decoder, DecoderConfig, Encoder, EncoderConfig
from kafjax.parallel import AXES, RULES, n_data_shares, shardings

CONFIG = DecoderConfig(
    vocab_size=64,
    hidden_size=16,
    mlp_size=24,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    sliding=(True, True, False),
    window=4,
)
DECODER = Decoder(CONFIG)
ENCODER = Encoder(EncoderConfig(vocab_size=64, hidden_size=16, mlp_size=24, n_layers=3, n_heads=2))


def mesh_of(data: int = 1, fsdp: int = 1, tensor: int = 1) -> AbstractMesh:
    """Shardings can be worked out for devices that are not there."""
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    return AbstractMesh(
        tuple(sizes.get(axis, 1) for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES)
    )


def specs(axes, abstract, mesh) -> dict[str, PartitionSpec]:
    return {
        path: leaf.spec for path, leaf in trees.flatten(shardings(axes, abstract, mesh)).items()
    }


def test_kernels_are_split_inside_and_outside_the_layer():
    found = specs(DECODER.axes(), DECODER.abstract_params(), mesh_of(2, 2, 2))
    assert found["embed/embedding"] == PartitionSpec("tensor", "fsdp")
    assert found["layers/attn/q_proj/kernel"] == PartitionSpec(None, "fsdp", "tensor")
    assert found["layers/attn/o_proj/kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert found["layers/mlp/down_proj/kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert found["layers/attn/q_norm/scale"] == PartitionSpec(None, None)
    assert found["final_norm/scale"] == PartitionSpec("fsdp")


@pytest.mark.parametrize("model", [DECODER, ENCODER], ids=["decoder", "encoder"])
def test_every_parameter_of_every_model_has_a_place(model):
    found = shardings(model.axes(), model.abstract_params(), mesh_of(1, 2, 2))
    assert jax.tree.structure(found) == jax.tree.structure(model.abstract_params())
    for path, leaf in trees.flatten(model.abstract_params()).items():
        assert trees.flatten(found)[path].shard_shape(leaf.shape)


def test_adapters_inherit_the_axes_of_their_kernels():
    adapters = lora.abstract(
        lora.Spec(rank=3, targets="q_proj|down_proj"), DECODER.abstract_params()
    )
    found = shardings(lora.axes(adapters, DECODER.axes()), adapters, mesh_of(1, 2, 2))
    assert jax.tree.structure(found) == jax.tree.structure(adapters)
    down, q = found["layers/mlp/down_proj/kernel"], found["layers/attn/q_proj/kernel"]
    assert (q["a"].spec, q["b"].spec) == (
        PartitionSpec(None, "fsdp", None),
        PartitionSpec(None, None, "tensor"),
    )
    assert (down["a"].spec, down["b"].spec) == (
        PartitionSpec(None, "tensor", None),
        PartitionSpec(None, None, "fsdp"),
    )


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


@pytest.mark.parametrize(
    ("axes", "sizes", "told"),
    [
        (
            ("embed", "mpl"),
            (4, 4),
            r"'layer/kernel', dimension 1: axis 'mpl' has no sharding rule. Did you mean 'mlp'\?",
        ),
        (
            ("heads", "mlp"),
            (4, 4),
            r"'layer/kernel': dimensions 0 and 1 both map to mesh axis 'tensor'",
        ),
        (
            ("embed", "embed"),
            (4, 4),
            r"'layer/kernel': dimensions 0 and 1 both map to mesh axis 'fsdp'",
        ),
        (
            ("embed", "kv_heads"),
            (4, 3),
            r"'layer/kernel', dimension 1 \('kv_heads', size 3\) does not divide over mesh axis tensor:2",
        ),
        (("embed",), (4, 4), r"'layer/kernel' has 2 dimensions and 1 axis names"),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_parameter_and_dimension(axes, sizes, told):
    with pytest.raises(UserError, match=told):
        shardings(
            {"layer": {"kernel": axes}}, {"layer": {"kernel": shape(*sizes)}}, mesh_of(1, 2, 2)
        )


def test_undeclared_parameter_is_an_error():
    with pytest.raises(UserError, match="'layer/bias' declares no logical axes"):
        shardings({"layer": {"kernel": ("embed",)}}, {"layer": {"bias": shape(4)}}, mesh_of())


def test_the_table_names_mesh_axes_only():
    targets = [rule if isinstance(rule, tuple) else (rule,) for rule in RULES.values()]
    assert {axis for rule in targets for axis in rule} <= {*AXES, None}


def test_rows_are_split_over_data_and_fsdp():
    assert n_data_shares(mesh_of(2, 3, 5)) == 6
    assert isinstance(
        jax.tree.leaves(shardings({"x": ("embed",)}, {"x": shape(6)}, mesh_of(2, 3, 5)))[0],
        NamedSharding,
    )
