"""Both norms against torch's, in value, gradient and dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kafjax.ops.norms import layer_norm, rms_norm

KEYS = jax.random.split(jax.random.key(0), 4)
X = 3 + 5 * jax.random.normal(KEYS[0], (2, 3, 16))
SCALE, BIAS = jax.random.normal(KEYS[1], (16,)), jax.random.normal(KEYS[2], (16,))


def check(ours, theirs, parameters):
    """`ours(x, *parameters)` against the torch module `theirs`, whose parameters are in the same
    order."""
    with torch.no_grad():
        for target, value in zip(theirs.parameters(), parameters, strict=True):
            target.copy_(torch.tensor(np.asarray(value)))
    x = torch.tensor(np.asarray(X), requires_grad=True)
    reference = theirs(x)
    cotangent = jax.random.normal(KEYS[3], X.shape)
    reference.backward(torch.tensor(np.asarray(cotangent)))
    out, pullback = jax.vjp(ours, X, *parameters)
    np.testing.assert_allclose(out, reference.detach(), atol=2e-6)
    for gradient, leaf in zip(pullback(cotangent), (x, *theirs.parameters()), strict=True):
        np.testing.assert_allclose(gradient, leaf.grad, atol=2e-5)


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_rms_norm_equals_gemmas(eps):
    check(lambda x, s: rms_norm(x, s, eps), Gemma3RMSNorm(16, eps), (SCALE,))


def test_rms_norm_without_an_offset_equals_llamas():
    check(lambda x, s: rms_norm(x, s, 1e-6, 0.0), LlamaRMSNorm(16, 1e-6), (SCALE,))


@pytest.mark.parametrize("eps", [1e-12, 0.5])
def test_layer_norm_equals_torch(eps):
    check(lambda x, s, b: layer_norm(x, s, b, eps), torch.nn.LayerNorm(16, eps), (SCALE, BIAS))


def test_bfloat16_is_the_float32_result_rounded_once():
    x = X.astype(jnp.bfloat16)
    for norm in (lambda x: rms_norm(x, SCALE, 1e-6), lambda x: layer_norm(x, SCALE, BIAS, 1e-6)):
        out = norm(x)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_array_equal(out, norm(x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_zeros_stay_finite():
    zeros = jnp.zeros((1, 16))
    assert jnp.isfinite(jax.grad(lambda x: rms_norm(x, SCALE, 1e-6).sum())(zeros)).all()
    np.testing.assert_array_equal(layer_norm(zeros, SCALE, BIAS, 1e-12), BIAS[None])
