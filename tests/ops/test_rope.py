"""Rotary positions against transformers' and by the property they are made for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.gemma3.modeling_gemma3 import apply_rotary_pos_emb
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from kafjax.ops.rope import Llama3Stretch, rope_angles, rotate

B, T, H, D = 2, 9, 3, 8
X = jax.random.normal(jax.random.key(0), (B, T, H, D))


@pytest.mark.parametrize(("theta", "factor"), [(1e4, 1.0), (1e6, 1.0), (1e6, 8.0)])
def test_rotation_equals_transformers(theta, factor):
    positions = jnp.array(
        [[0, 1, 2, 3, 4, 5, 6, 7, 8], [3, 9, 100, 511, 512, 513, 5000, 30000, 32767]]
    )
    inverse = 1.0 / theta ** (torch.arange(0, D, 2).float() / D) / factor
    half = torch.tensor(np.asarray(positions)).float()[..., None] * inverse
    angles = torch.cat([half, half], dim=-1)
    x = torch.tensor(np.asarray(X)).transpose(1, 2)
    expected, _ = apply_rotary_pos_emb(x, x, angles.cos(), angles.sin())
    np.testing.assert_allclose(
        rotate(X, rope_angles(positions, D, theta, factor)), expected.transpose(1, 2), atol=5e-3
    )
    # float32 angles near 32767 differ in their last bits between libraries
    small = jnp.minimum(positions, 1000)
    half = torch.tensor(np.asarray(small)).float()[..., None] * inverse
    angles = torch.cat([half, half], dim=-1)
    expected, _ = apply_rotary_pos_emb(x, x, angles.cos(), angles.sin())
    np.testing.assert_allclose(
        rotate(X, rope_angles(small, D, theta, factor)), expected.transpose(1, 2), atol=2e-4
    )


@pytest.mark.parametrize(("head_dim", "factor"), [(64, 32.0), (128, 8.0)])
def test_the_stretched_frequencies_of_llama_3_equal_transformers(head_dim, factor):
    """Settings are those of Llama 3.2 1B and of 3.1: a third is kept, a third divided, and some lie
    between."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    rope["original_max_position_embeddings"] = 8192
    config = transformers.LlamaConfig(
        head_dim=head_dim, max_position_embeddings=131072, rope_parameters=rope
    )
    expected = LlamaRotaryEmbedding(config).inv_freq.numpy()
    cos, sin = rope_angles(jnp.ones((1, 1)), head_dim, 5e5, factor, Llama3Stretch(1.0, 4.0, 8192))
    np.testing.assert_allclose(np.arctan2(sin, cos).ravel(), expected, rtol=1e-5)
    plain = 5e5 ** -(np.arange(0, head_dim, 2) / head_dim)
    ratio = plain / expected
    assert {round(r, 3) for r in ratio} > {1.0, factor} and np.all(
        (ratio > 0.999) & (ratio < factor * 1.001)
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500))
def test_products_depend_on_the_distance_only(first, second, shift):
    def product(i, j):
        angles = [rope_angles(jnp.array([[p]]), D, 1e4) for p in (i, j)]
        return jnp.sum(rotate(X[:1, :1], angles[0]) * rotate(X[:1, 1:2], angles[1]), axis=-1)

    np.testing.assert_allclose(
        product(first, second), product(first + shift, second + shift), atol=2e-3
    )


def test_position_zero_changes_nothing_and_no_position_changes_a_length():
    angles = rope_angles(jnp.arange(T)[None].repeat(B, 0), D, 1e4)
    np.testing.assert_array_equal(rotate(X, angles)[:, 0], X[:, 0])
    np.testing.assert_allclose(
        jnp.linalg.norm(rotate(X, angles), axis=-1), jnp.linalg.norm(X, axis=-1), rtol=1e-5
    )


def test_angles_stay_float32_under_bfloat16():
    """A bfloat16 angle at position 501 would be off by whole radians."""
    angles = rope_angles(jnp.full((B, T), 501), D, 1e4)
    out = rotate(X.astype(jnp.bfloat16), angles)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), rotate(X, angles), atol=0.05)
