"""Attention against torch's, and its blocks against one block."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracles import quick_jit

from kafjax.core.errors import UserError
from kafjax.ops.attention import attend, attend_fused

B, T, S, D = 2, 5, 7, 8


def inputs(heads, kv_heads, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    q = jax.random.normal(keys[0], (B, T, heads, D))
    k, v = (jax.random.normal(key, (B, S, kv_heads, D)) for key in keys[1:3])
    mask = jax.random.bernoulli(keys[3], 0.6, (B, T, S)).at[:, :, 0].set(True)
    return q, k, v, mask


def torch_attend(q, k, v, mask, scale):
    q, k, v = (torch.tensor(np.asarray(x), requires_grad=True) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        torch.tensor(np.asarray(mask))[:, None],
        scale=scale,
        enable_gqa=True,
    )
    return (q, k, v), out.transpose(1, 2)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_output_and_gradients_equal_torch(heads, kv_heads):
    q, k, v, mask = inputs(heads, kv_heads)
    leaves, reference = torch_attend(q, k, v, mask, 0.3)
    out = quick_jit(lambda q, k, v: attend(q, [k], [v], [mask], 0.3))(q, k, v)
    np.testing.assert_allclose(out, reference.detach(), atol=1e-6)
    cotangent = jax.random.normal(jax.random.key(9), out.shape)
    reference.backward(torch.tensor(np.asarray(cotangent)))
    pull_back = quick_jit(
        lambda *qkv: jax.vjp(lambda q, k, v: attend(q, [k], [v], [mask], 0.3), *qkv)[1](cotangent)
    )
    for ours, theirs in zip(pull_back(q, k, v), leaves, strict=True):
        np.testing.assert_allclose(ours, theirs.grad, atol=1e-5)


@pytest.mark.parametrize("at", [0, 3, 6])
def test_blocks_of_keys_equal_one_block(at):
    """One block may hold no visible key for some queries."""
    q, k, v, mask = inputs(4, 2)
    mask = mask.at[0, :, at:].set(False).at[0, :, 0].set(True)
    whole = attend(q, [k], [v], [mask], 0.3)

    def cut(x, axis):
        return jnp.split(x, [at], axis=axis)

    parts = [
        part for part in zip(cut(k, 1), cut(v, 1), cut(mask, 2), strict=True) if part[0].shape[1]
    ]
    blocks = attend(q, *(list(column) for column in zip(*parts, strict=True)), 0.3)
    np.testing.assert_allclose(blocks, whole, atol=1e-6)


def test_a_query_that_may_look_nowhere_gives_numbers_and_hurts_no_other():
    q, k, v, mask = inputs(4, 2)
    blind = mask.at[0, 2].set(False)

    def total(q, mask):
        out = attend(q, [k], [v], [mask], 0.3)
        return jnp.sum(out[:, jnp.array([0, 1, 3, 4])]), out

    (_, out), gradient = jax.value_and_grad(total, has_aux=True)(q, blind)
    assert jnp.isfinite(out).all() and jnp.isfinite(gradient).all()
    np.testing.assert_array_equal(
        out.at[0, 2].set(0), attend(q, [k], [v], [mask], 0.3).at[0, 2].set(0)
    )


def test_large_scores_do_not_overflow():
    q, k, v, mask = inputs(4, 2)
    out = attend(1e4 * q, [1e4 * k], [v], [mask], 1.0)
    _, reference = torch_attend(1e4 * q, 1e4 * k, v, mask, 1.0)
    np.testing.assert_allclose(out, reference.detach(), atol=1e-6)


def test_bfloat16_in_bfloat16_out_with_a_float32_softmax():
    q, k, v, mask = inputs(4, 2)
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    out = quick_jit(lambda q, k, v: attend(q, [k], [v], [mask], 0.3))(q, k, v)
    assert out.dtype == jnp.bfloat16
    _, reference = torch_attend(*(x.astype(jnp.float32) for x in (q, k, v)), mask, 0.3)
    assert np.abs(out.astype(jnp.float32) - reference.detach().numpy()).max() < 2 * 2**-8 * float(
        jnp.abs(v).max()
    )


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no NVIDIA GPU here")
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2)])
def test_cudnn_equals_xla(heads, kv_heads):
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (2, 128, n, 64), jnp.bfloat16)
        for key, n in zip(keys, (heads, kv_heads, kv_heads), strict=True)
    )
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((128, 128), bool)), (2, 128, 128))
    plain, fused = (
        jax.jit(
            jax.value_and_grad(
                lambda q, k, v, f=f: jnp.sum(f(q, k, v).astype(jnp.float32) ** 2), argnums=(0, 1, 2)
            )
        )(q, k, v)
        for f in (
            lambda q, k, v: attend(q, [k], [v], [mask], 0.125),
            lambda q, k, v: attend_fused(q, k, v, mask, 0.125),
        )
    )
    for ours, theirs in zip(jax.tree.leaves(fused), jax.tree.leaves(plain), strict=True):
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        assert np.linalg.norm(ours - theirs) < 2e-2 * np.linalg.norm(theirs)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU here")
def test_cudnn_without_a_gpu_is_told():
    q, k, v, mask = inputs(4, 4)
    with pytest.raises(
        UserError,
        match=r"cuDNN attention needs an NVIDIA GPU, and JAX runs on cpu; leave --attention at xla",
    ):
        attend_fused(q, k, v, mask, 0.3)
