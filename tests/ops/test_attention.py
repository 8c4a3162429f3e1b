"""Attention against torch's, and its blocks against one block."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracles import quick_jit

from kafjax.core.errors import UserError
from kafjax.ops.attention import NEVER, Past, ages, attend, attention

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
            lambda q, k, v: attention(q, k, v, scale=0.125, kernel="cudnn"),
        )
    )
    for ours, theirs in zip(jax.tree.leaves(fused), jax.tree.leaves(plain), strict=True):
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        assert np.linalg.norm(ours - theirs) < 2e-2 * np.linalg.norm(theirs)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU here")
def test_cudnn_without_a_gpu_is_told():
    q, k, v, _ = inputs(4, 4)
    with pytest.raises(
        UserError,
        match=r"cuDNN attention needs an NVIDIA GPU, and JAX runs on cpu; leave --attention at auto",
    ):
        attention(q, k, v, scale=0.3, kernel="cudnn")


def seen_by_loops(T, N, next_row, segments, window):
    """Masks over slots and over new tokens, written down position by position."""
    past, new = np.zeros((len(next_row), T, N), bool), np.zeros((len(next_row), T, T), bool)
    for row, start in enumerate(next_row):
        held = {position % N: position for position in range(start)} if N else {}
        for t in range(T):
            for slot, position in held.items():
                past[row, t, slot] = start + t - position < window
            for j in range(t + 1):
                new[row, t, j] = t - j < window and segments[row, t] == segments[row, j]
    return past, new


@st.composite
def problems(draw):
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    T = draw(st.integers(1, 300))
    with_cache = draw(st.booleans()) and T < 150
    return {
        "shape": (draw(st.integers(1, 2)), T, kv_heads * group, kv_heads),
        "head_dim": draw(st.sampled_from([64, 80, 128, 256])),
        "window": draw(st.sampled_from([None, 1, 5, 127, 128, 129, 200])),
        "n_segments": 1 if with_cache else draw(st.integers(1, 5)),
        "n_slots": draw(st.integers(1, 150)) if with_cache else 0,
        "cap": draw(st.sampled_from([None, 2.0])),
        "seed": draw(st.integers(0, 2**16)),
    }


@hypothesis.settings(
    deadline=None,
    max_examples=12,
    derandomize=True,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],  # each shape is a compile
)
@hypothesis.given(problems())
def test_values_and_gradients_are_those_of_the_plain_form(problem):
    (B, T, H, K), D, N = problem["shape"], problem["head_dim"], problem["n_slots"]
    rng = np.random.default_rng(problem["seed"])
    # a cache of a sliding layer is as long as its window or longer
    window = problem["window"] if problem["window"] is None or N == 0 else min(problem["window"], N)
    segments = np.sort(rng.integers(0, problem["n_segments"], (B, T)), axis=1)
    next_row = rng.integers(0, 2 * N + 1, B) if window else rng.integers(0, N + 1, B)
    past_mask, mask = seen_by_loops(T, N, next_row, segments, window or NEVER)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    q, k, v, d_out = draw(B, T, H, D), draw(B, T, K, D), draw(B, T, K, D), draw(B, T, H, D)
    cache = (draw(B, N, K, D), draw(B, N, K, D)) if N else ()
    scale, cap, keep = D**-0.5, problem["cap"], None if N else (jnp.asarray(segments),) * 2

    def ours(q, k, v, *cache):
        past = Past(*cache, ages(jnp.asarray(next_row), N)) if cache else None
        return attention(q, k, v, scale=scale, cap=cap, window=window, segments=keep, past=past)

    def plain(q, k, v, *cache):
        blocks = [[k], [v], [jnp.asarray(mask)]]
        if cache:
            blocks = [[x, *own] for x, own in zip((*cache, past_mask), blocks, strict=True)]
        return attend(q, *blocks, scale, cap)

    def both(f):
        def run(*given):
            out, pull_back = jax.vjp(f, *given)
            return out, pull_back(d_out)

        return quick_jit(run)(q, k, v, *cache)

    for found, expected in zip(
        jax.tree.leaves(both(ours)), jax.tree.leaves(both(plain)), strict=True
    ):
        largest = max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * largest)


def test_no_array_grows_with_the_square_of_the_length():
    """The gradient at 4096 tokens and eight heads; the plain form takes 1.9 GB."""
    B, T, H, K, D = 1, 4096, 8, 4, 64
    q, k, v = (jax.ShapeDtypeStruct((B, T, n, D), jnp.float32) for n in (H, K, K))
    segments = jax.ShapeDtypeStruct((B, T), jnp.int32)

    def total(q, k, v, segments):
        out = attention(q, k, v, scale=0.1, window=1024, segments=(segments, segments))
        return jnp.sum(jnp.square(out))

    gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    traced = gradient.trace(q, k, v, segments)
    assert max(x.size for x in arrays_of(traced.jaxpr.jaxpr)) <= B * T * H * D
    memory = traced.lower().compile().memory_analysis()
    assert memory.temp_size_in_bytes < 12 * 4 * B * T * H * D


def arrays_of(jaxpr):
    """Every array of a program, those inside loops and functions included."""
    for equation in jaxpr.eqns:
        yield from (x.aval for x in equation.outvars)
        for inner in jax.core.jaxprs_in_params(equation.params):
            yield from arrays_of(inner)


def test_only_blocks_in_sight_are_visited():
    """Keys before the window and in the future may hold anything, even what would spoil sums."""
    T, window = 600, 100
    q, k, v = (
        jax.random.normal(key, (1, T, 2, 8)) for key in jax.random.split(jax.random.key(0), 3)
    )
    out = attention(q, k, v, scale=0.3, window=window)
    spoiled = v.at[:, : T - 128 - window - 128].set(jnp.nan)
    last = attention(q, k, spoiled, scale=0.3, window=window)[:, -64:]
    np.testing.assert_array_equal(last, out[:, -64:])
    first = attention(q, k, v.at[:, 128:].set(jnp.nan), scale=0.3, window=window)[:, :128]
    np.testing.assert_array_equal(first, out[:, :128])


def test_bfloat16_gradients_are_as_close_as_those_of_the_plain_form():
    keys = jax.random.split(jax.random.key(0), 3)
    exact = [
        jax.random.normal(key, (2, 300, n, 64)) for key, n in zip(keys, (4, 2, 2), strict=True)
    ]
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((300, 300), bool)), (2, 300, 300))

    def gradients(f, dtype):
        def total(q, k, v):
            return jnp.sum(jnp.square(f(q, k, v).astype(jnp.float32)))

        found = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*(x.astype(dtype) for x in exact))
        return [np.asarray(x, np.float32) for x in found]

    def ours(q, k, v):
        return attention(q, k, v, scale=0.125)

    def plain(q, k, v):
        return attend(q, [k], [v], [mask], 0.125)

    for found, other, true in zip(
        gradients(ours, jnp.bfloat16),
        gradients(plain, jnp.bfloat16),
        gradients(plain, jnp.float32),
        strict=True,
    ):
        assert np.linalg.norm(found - true) < 1.2 * np.linalg.norm(other - true)
