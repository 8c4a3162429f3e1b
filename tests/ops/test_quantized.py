"""Kernels as small integers: their values, their error, their bytes, and the product with them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.ops.linear import LoRAWeight, linear
from kafjax.ops.quantized import (
    FORMATS,
    NF4,
    dequantize,
    dequantize_params,
    format_of,
    quantize,
    quantize_params,
    refuse_quantized,
)

W = jax.random.normal(jax.random.key(0), (3, 128, 20)) * jnp.linspace(0.01, 2, 20)
X = jax.random.normal(jax.random.key(1), (2, 5, 128))
formats = pytest.mark.parametrize("format", FORMATS)


def test_nf4_has_the_values_of_the_paper():
    """Quantiles of N(0, 1) at even probabilities, 8 above zero and 7 below, and zero, over the
    largest (arXiv:2305.14314, appendix E)."""
    end = 1 - (1 / 32 + 1 / 30) / 2

    def quantiles(n):
        return norm.ppf(np.linspace(end, 0.5, n + 1)[:-1])

    values = np.sort([*quantiles(8), 0, *-quantiles(7)])
    np.testing.assert_allclose(NF4, values / values.max(), atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.sampled_from([(2, 1), (64, 3), (3, 192, 2)]),
    st.floats(1e-3, 1e3),
    st.integers(0, 99),
)
def test_error_is_bounded_by_half_a_step(format, shape, size, seed):
    w = size * np.random.default_rng(seed).standard_t(3, shape).astype(np.float32)  # long tails
    q = quantize(w, format)
    *stacked, n_in, n_out = shape
    tile = n_in // q.scale.shape[-2]
    assert q.shape == shape and tile == (n_in if format == "int8" else min(n_in, 64))
    largest = np.abs(w).reshape(*stacked, -1, tile, n_out).max(axis=-2, keepdims=True)
    off = np.abs(np.asarray(dequantize(q)) - w).reshape(*stacked, -1, tile, n_out)
    half_step = 1 / 255 if format == "int8" else np.diff(NF4).max() / 2
    assert half_step < (1 / 127 if format == "int8" else 0.153)
    assert np.all(off <= half_step * largest * (1 + 1e-4))


@formats
def test_values_are_those_of_qwix(format):
    how = {"qtype": jnp.int8} if format == "int8" else {"qtype": "nf4", "tiled_axes": {1: 64}}
    expected = qwix.dequantize(qwix.quantize(W, channelwise_axes=(0, 2), **how))
    np.testing.assert_array_equal(dequantize(quantize(W, format)), expected)


@formats
def test_quantising_again_moves_hardly_anything(format):
    """nf4 gives its own values back. int8's largest is 127 or -128 steps of a scale made for 127.5,
    so others may move to the next one."""
    q = quantize(W, format)
    again = quantize(dequantize(q), format)
    moved = np.abs(np.asarray(again.values, np.int32) - np.asarray(q.values, np.int32))
    assert moved.max() <= (1 if format == "int8" else 0)
    np.testing.assert_allclose(again.scale, q.scale, rtol=0.005 if format == "int8" else 0)


@formats
def test_zeros_stay_zero(format):
    np.testing.assert_array_equal(dequantize(quantize(W.at[:, :, 3].set(0), format))[:, :, 3], 0)


@pytest.mark.parametrize(("format", "share"), [("int8", 0.27), ("nf4", 0.16)])
def test_bytes_are_those_of_the_arrays(format, share):
    q = quantize(W, format)
    stored = sum(array.nbytes for array in jax.tree.leaves(q))
    assert trees.n_bytes({"kernel": q}) == stored <= share * W.nbytes


@formats
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_linear_is_that_of_the_dequantised_kernel(format, dtype):
    """The product runs under `scan` over layers, as in a model, with its gradient, also beside an
    adapter. The kernel has no gradient."""
    q, x = quantize(W, format), X.astype(dtype)
    a, b = (
        jax.random.normal(jax.random.key(2), (3, 128, 2)),
        jax.random.normal(jax.random.key(3), (3, 2, 20)),
    )

    def loss(x, a, b, kernel):
        def layers(total, layer):
            return (total + jnp.sum(jnp.sin(linear(x, layer).astype(jnp.float32))), None)

        plain, _ = jax.lax.scan(layers, 0.0, kernel)
        return jax.lax.scan(layers, plain, LoRAWeight(kernel, a, b))[0]

    got = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(x, a, b, q)
    expected = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(x, a, b, dequantize(q, dtype))
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(
            ours.astype(jnp.float32), theirs.astype(jnp.float32), rtol=1e-4, atol=1e-4
        )
    scale_gradient = jax.grad(lambda scale: loss(x, a, b, type(q)(q.values, scale, format)))(
        q.scale
    )
    np.testing.assert_array_equal(scale_gradient, 0)


def test_only_kernels_are_quantised():
    params = {
        "embed": {"embedding": jnp.ones((4, 6))},
        "layers": {"proj": {"kernel": W, "bias": jnp.ones(20)}},
    }
    q = quantize_params(params, "nf4")
    assert (format_of(q), format_of(params)) == ("nf4", None)
    assert (
        q["embed"]["embedding"] is params["embed"]["embedding"]
        and q["layers"]["proj"]["bias"] is params["layers"]["proj"]["bias"]
    )
    np.testing.assert_array_equal(
        dequantize_params(q)["layers"]["proj"]["kernel"], dequantize(q["layers"]["proj"]["kernel"])
    )


def test_bad_input_is_told():
    with pytest.raises(UserError, match=r"unknown format 'nf5'.*nf4"):
        quantize(W, "nf5")
    with pytest.raises(UserError, match="7 inputs are an odd number; use int8"):
        quantize(W[:, :7], "nf4")
    params = quantize_params({"kernel": W}, "int8")
    with pytest.raises(UserError, match=r"quantised already \(int8\)"):
        quantize_params(params, "nf4")
    with pytest.raises(
        UserError, match="moving needs kernels of floats, and these are stored in int8"
    ):
        refuse_quantized(params, "moving")
    with pytest.raises(TypeError):
        jnp.asarray(params["kernel"])


def test_experts_are_not_quantised():
    with pytest.raises(UserError, match="'layers/mlp/up_experts' cannot be quantised"):
        quantize_params({"layers": {"mlp": {"up_experts": jnp.ones((2, 3, 4, 4))}}}, "int8")
