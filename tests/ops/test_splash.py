"""The TPU's kernel without a TPU: its numbers by the interpreter, against the form by blocks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kafjax.ops.attention import ATTENTION, attention, kernel_for
from kafjax.ops.splash import splash_attention


@pytest.mark.parametrize(
    ("T", "heads", "kv_heads", "head_dim", "window", "cap"),
    [
        (128, 2, 1, 64, None, None),
        (300, 4, 2, 128, 150, None),
        (200, 2, 2, 256, 64, 3.0),
    ],
)
def test_values_and_gradients_are_those_of_the_form_by_blocks(
    T, heads, kv_heads, head_dim, window, cap
):
    rng = np.random.default_rng(0)
    q, k, v, d_out = (
        jnp.asarray(rng.normal(size=(2, T, n, head_dim)), jnp.float32)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    segments = jnp.asarray(np.sort(rng.integers(0, 3, (2, T)), axis=1), jnp.int32)
    scale = head_dim**-0.5

    def ours(q, k, v):
        return splash_attention(q, k, v, segments, window, scale, cap, interpret=True)

    def blocks(q, k, v):
        kept = {"window": window, "cap": cap, "segments": (segments, segments)}
        return attention(q, k, v, scale=scale, **kept)

    (out, pull_back), (expected, pull_back_too) = jax.vjp(ours, q, k, v), jax.vjp(blocks, q, k, v)
    for found, other in zip(
        (out, *pull_back(d_out)), (expected, *pull_back_too(d_out)), strict=True
    ):
        np.testing.assert_allclose(found, other, rtol=1e-4, atol=1e-5 * np.abs(other).max())


def test_each_platform_has_its_kernel():
    assert ATTENTION[0] == "auto"
    assert [kernel_for("auto", name) for name in ("tpu", "gpu", "cpu")] == ["splash", "xla", "xla"]
    assert kernel_for("xla", "tpu") == "xla" and kernel_for("cudnn", "gpu") == "cudnn"
