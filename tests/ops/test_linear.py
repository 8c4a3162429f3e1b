"""The one product: plain, with an adapter, and in bfloat16 with float32 sums."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kafjax.ops.linear import LoRAWeight, linear

KEYS = jax.random.split(jax.random.key(0), 4)
X = jax.random.normal(KEYS[0], (3, 5, 16))
W = jax.random.normal(KEYS[1], (16, 12))
A, B = jax.random.normal(KEYS[2], (16, 2)), jax.random.normal(KEYS[3], (2, 12))


def loss(x, w):
    return jnp.sum(jnp.sin(linear(x, w).astype(jnp.float32)))


def test_an_adapter_beside_a_kernel_equals_their_sum():
    weight = LoRAWeight(W, A, B)
    np.testing.assert_allclose(linear(X, weight), linear(X, W + A @ B), atol=2e-5)
    d_x, d_weight = jax.grad(loss, (0, 1))(X, weight)
    expected_x, d_sum = jax.grad(loss, (0, 1))(X, W + A @ B)
    np.testing.assert_allclose(d_x, expected_x, atol=1e-3)
    np.testing.assert_allclose(d_weight.a, d_sum @ B.T, atol=1e-3)
    np.testing.assert_allclose(d_weight.b, A.T @ d_sum, atol=1e-3)


@pytest.mark.parametrize(
    "use", [jnp.asarray, np.asarray, lambda w: X @ w, lambda w: w + 1.0, lambda w: jnp.dot(X, w)]
)
def test_using_an_adapted_kernel_as_an_array_raises(use):
    with pytest.raises((TypeError, ValueError)):
        result = use(LoRAWeight(W, A, B))
        # numpy wraps anything: that is no number either
        if isinstance(result, np.ndarray) and result.dtype == object:
            raise TypeError("not an array")


def test_bfloat16_sums_in_float32():
    """A sum of 2048 ones and small numbers that a bfloat16 accumulator would lose."""
    x = jnp.concatenate([jnp.full((1, 1), 256.0), jnp.full((1, 2048), 0.5)], axis=1).astype(
        jnp.bfloat16
    )
    y = linear(x, jnp.ones((2049, 1), jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert float(y[0, 0]) == 256 + 1024


def test_bfloat16_gradients_are_the_float32_ones_rounded():
    rounded = [v.astype(jnp.bfloat16) for v in (X, W)]
    cotangent = jax.random.normal(KEYS[2], (3, 5, 12)).astype(jnp.bfloat16)
    out, pullback = jax.vjp(linear, *rounded)
    exact_out, exact_pullback = jax.vjp(linear, *(v.astype(jnp.float32) for v in rounded))
    exact = (exact_out, *exact_pullback(cotangent.astype(jnp.float32)))
    for ours, expected in zip((out, *pullback(cotangent)), exact, strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype(jnp.float32), expected, rtol=2**-8, atol=1e-6)


def test_a_kernel_of_another_dtype_is_cast_to_the_activations():
    np.testing.assert_array_equal(
        linear(X.astype(jnp.bfloat16), W), linear(X.astype(jnp.bfloat16), W.astype(jnp.bfloat16))
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_frozen_kernel_keeps_no_input_for_the_backward_pass(dtype):
    """Nothing of the shape of `x` is saved where only `x` is differentiated, and no kernel where
    only the kernel is."""
    x, w = jnp.ones((64, 16), dtype), jnp.ones((16, 12), dtype)
    saved_for_x = [leaf.shape for leaf in jax.tree.leaves(jax.vjp(lambda x: linear(x, w), x)[1])]
    saved_for_w = [leaf.shape for leaf in jax.tree.leaves(jax.vjp(lambda w: linear(x, w), w)[1])]
    assert (64, 16) not in saved_for_x
    assert (16, 12) not in saved_for_w


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_vmap_over_adapters_equals_one_after_another(dtype):
    """Many adapters on one kernel: the kernel itself is not batched."""
    x, lanes = X.astype(dtype), 3
    a = jax.random.normal(KEYS[0], (lanes, 16, 2))
    b = jax.random.normal(KEYS[1], (lanes, 2, 12))
    gradient = jax.grad(lambda ab: loss(x, LoRAWeight(W, *ab)))
    together = jax.vmap(gradient)((a, b))
    alone = [gradient((a[i], b[i])) for i in range(lanes)]
    jax.tree.map(
        lambda t, *s: np.testing.assert_allclose(t, jnp.stack(s), rtol=1e-2, atol=1e-3),
        together,
        *alone,
    )
