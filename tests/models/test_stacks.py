"""Layers of several shapes: which lie together, and that all that is done with parameters goes by
the numbers of their layers."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import FAMILIES, quick_jit, random_tokens

from kafjax import lora
from kafjax.core import trees
from kafjax.evaluation.cost import attention_flops
from kafjax.models import CONFIGS, Decoder, DecoderConfig
from kafjax.models.stacks import blocks
from kafjax.ops import quantized
from kafjax.training.demand import decoder_shape

TINY = DecoderConfig.from_hf({**FAMILIES["gemma4_text"][2], "model_type": "gemma4_text"})
TOKENS = random_tokens(1, (2, 9), 101)
SPEC = lora.Spec(
    rank=2,
    targets=r"layers/[135]/.*(q|v|down)_proj|per_layer",
    rank_pattern={"layers/5/": 3},
    layers=(1, 2, 3, 4, 5),
)


@pytest.fixture(scope="module")
def model():
    return Decoder(TINY)


@pytest.fixture(scope="module")
def params(model):
    return quick_jit(model.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def apply(model):
    return quick_jit(model.apply)


@pytest.fixture(scope="module")
def adapters(params):
    drawn = lora.init(SPEC, params, jax.random.key(1))
    rng = np.random.default_rng(0)
    moved = {
        path: pair
        | {
            "b": 0.3
            * rng.standard_normal(pair["b"].shape, np.float32)
            * _own(path, pair["b"], params)
        }
        for path, pair in drawn.items()
    }
    return jax.tree.map(jnp.asarray, moved)


def _own(path, b, params):
    """Ones where a row of `b` belongs to its layer's own rank."""
    return (np.arange(b.shape[-2]) < lora.ranks(SPEC, params)[path][..., None])[..., None]


def names(config: DecoderConfig) -> list[list[str]]:
    return [[stack.name for stack in block] for block in blocks(config)]


def test_layers_of_one_shape_are_one_stack_and_others_repeat_the_shortest_period():
    assert names(CONFIGS["gemma3-1b"]) == names(CONFIGS["smollm3-3b"]) == [[""]]
    assert names(CONFIGS["gemma4-31b"]) == [[f"from{i}by6" for i in range(6)]]
    assert names(CONFIGS["gemma4-e2b"]) == [
        [f"from{i}by5" for i in range(5)],
        [f"from{i}by5" for i in range(15, 20)],
    ]
    for config in CONFIGS.values():
        numbers = [
            number for block in blocks(config) for stack in block for number in stack.numbers
        ]
        assert sorted(numbers) == list(range(config.n_layers))
        for stack in (stack for block in blocks(config) for stack in block):
            assert {config.shape(i) for i in stack.numbers} == {stack.shape}


def test_init_is_what_abstract_params_and_axes_say(model, params):
    def describe(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    assert describe(params) == describe(model.abstract_params())
    axes = trees.flatten(model.axes())
    assert {path: len(names) for path, names in axes.items()} == {
        path: x.ndim for path, x in trees.flatten(params).items()
    }


def test_unrolling_and_remat_change_neither_loss_nor_gradient(model, params):
    def value_and_grad(**changes):
        variant = dataclasses.replace(model, **changes)
        return quick_jit(
            jax.value_and_grad(
                lambda params: jnp.mean(jax.nn.log_softmax(variant.apply(params, TOKENS))[..., 3])
            )
        )(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        value_and_grad(unroll=True, remat="full"),
        value_and_grad(),
    )


def test_patterns_and_numbers_mean_the_layers_of_the_model(params):
    ranks = lora.ranks(SPEC, params)
    by_layer = {path: rank.tolist() for path, rank in ranks.items()}
    assert by_layer["layers/from1by2/attn/v_proj/kernel"] == [2, 2]  # layers 1 and 3
    assert (
        by_layer["layers/from5by2/attn/q_proj/kernel"] == [3]
        and "layers/from5by2/attn/v_proj/kernel" not in by_layer
    )
    assert (
        by_layer["layers/from0by2/per_layer/gate/kernel"] == [0, 2]
        and "layers/from0by2/attn/q_proj/kernel" not in by_layer
    )
    again = lora.explicit(ranks, lora.alphas(SPEC, params), rank=2, alpha=32.0)
    assert {path: rank.tolist() for path, rank in lora.ranks(again, params).items()} == by_layer
    everywhere = lora.ranks(lora.Spec(targets="all-linear"), params)
    assert {path for path in trees.flatten(params) if path.endswith("/kernel")} == set(everywhere)


def test_an_adapter_computes_the_same_attached_and_merged(params, apply, adapters):
    attached = apply(lora.attach(params, adapters, SPEC), TOKENS)
    np.testing.assert_allclose(
        attached, apply(lora.merge(params, adapters, SPEC), TOKENS), atol=1e-4
    )
    assert jnp.max(jnp.abs(attached - apply(params, TOKENS))) > 0.1


def test_lanes_compute_what_each_adapter_does_alone(model, params, apply, adapters):
    other = lora.Spec(rank=1, targets="gate_proj")
    specs, each = (SPEC, other), (adapters, lora.init(other, params, jax.random.key(2)))
    shapes = lora.lanes.padded_shapes(specs, params)
    padded = jax.tree.map(
        lambda *lanes: np.stack(lanes), *(lora.lanes.pad(lane, shapes) for lane in each)
    )
    scales = jax.tree.map(
        lambda *lanes: np.stack(lanes), *(lora.lanes.scales(spec, params, shapes) for spec in specs)
    )
    together = quick_jit(
        jax.vmap(lambda lane, scale: model.apply(lora.lanes.attach(params, lane, scale), TOKENS))
    )(padded, scales)
    for ours, spec, lane in zip(together, specs, each, strict=True):
        np.testing.assert_allclose(ours, apply(lora.merge(params, lane, spec), TOKENS), atol=1e-4)


def test_a_quantised_base_is_the_one_that_it_dequantises_to(params, apply):
    stored = quantized.quantize_params(params, "int8")
    np.testing.assert_allclose(
        apply(stored, TOKENS), apply(quantized.dequantize_params(stored), TOKENS), atol=1e-4
    )


def test_attention_is_counted_layer_by_layer(model):
    shape, length = decoder_shape(model), 12
    widths = [
        TINY.shape(i).head_dim
        * sum(min(t + 1, TINY.window if TINY.sliding[i] else length) for t in range(length))
        for i in range(6)
    ]
    assert attention_flops(shape, length) == 4 * TINY.n_heads * sum(widths)
    assert shape.head_dims == sum(TINY.shape(i).head_dim for i in range(6))
