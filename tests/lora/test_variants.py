"""Laws that hold for every variant: it starts as the base, attached equals merged equals plain, and
how layers are run changes nothing."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import quick_jit, random_tokens

from kafjax import lora
from kafjax.core import trees
from kafjax.models import Decoder
from kafjax.ops.linear import linear
from tests.shapes import ONE_KEY_HEAD

MODEL = Decoder(ONE_KEY_HEAD)
TOKENS = random_tokens(0, (2, 9), 61)
ALL = lora.Spec(
    rank=3,
    alpha=6.0,
    targets="embed/|(q|o|up|down)_proj",
    rank_pattern={"q_proj": 5, "layers/0/mlp": 2},
    alpha_pattern={"o_proj": 4.0},
    rslora=True,
    dora=True,
    dropout=0.25,
    trained="norm",
)


def noisy(adapters, spec, params, seed=1):
    """Returns adapters as after some training: padding of ranks is still zero."""
    rng = np.random.default_rng(seed)
    moved = jax.tree.map(
        lambda x: x + jnp.array(0.2 * rng.standard_normal(x.shape, np.float32)), adapters
    )
    for path, rank in lora.ranks(spec, params).items():
        own = np.arange(rank.max()) < rank[..., None]
        moved[path] |= {
            "a": moved[path]["a"] * own[..., None, :],
            "b": moved[path]["b"] * own[..., :, None],
        }
    return moved


@settings(max_examples=12)
@given(
    shape=st.sampled_from([(4, 6), (6, 4), (2, 5, 5), (3, 4, 6)]),
    rank=st.integers(1, 4),
    of_one=st.integers(1, 4),
    layers=st.none() | st.just((1,)),
    alpha=st.floats(0.5, 16),
    rslora=st.booleans(),
    dora=st.booleans(),
    init=st.sampled_from(lora.INITS),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_fresh_is_the_base_and_attached_is_merged_is_plain(
    shape, rank, of_one, layers, alpha, rslora, dora, init, dtype
):
    kernel = np.random.default_rng(0).standard_normal(shape, np.float32)
    params = {"layers": {"x": {"kernel": jnp.asarray(kernel, dtype)}}}
    stacked = len(shape) == 3
    spec = lora.Spec(
        rank,
        alpha,
        "x",
        layers=layers if stacked else None,
        rank_pattern={"layers/1/x" if stacked else "x": of_one},
        rslora=rslora,
        dora=dora,
        init=init,
    )
    initial = lora.init(spec, params, jax.random.key(0))
    base = lora.residual(params, initial, spec)
    identity = np.eye(shape[-2], dtype=np.float32)
    multiply = (
        (lambda w: jax.vmap(linear, (None, 0))(identity, w))
        if stacked
        else (lambda w: linear(identity, w))
    )

    def kernel_of(way, base, adapters, spec):
        return np.float32(multiply(way(base, adapters, spec)["layers"]["x"]["kernel"]))

    rounding = (
        {"atol": 1e-5, "rtol": 1e-5} if dtype == jnp.float32 else {"atol": 0.05, "rtol": 0.02}
    )
    np.testing.assert_allclose(
        kernel_of(lora.attach, base, initial, spec),
        np.float32(params["layers"]["x"]["kernel"]),
        **rounding,
    )
    adapters = noisy(initial, spec, params)
    attached = kernel_of(lora.attach, base, adapters, spec)
    np.testing.assert_allclose(kernel_of(lora.merge, base, adapters, spec), attached, **rounding)
    np.testing.assert_allclose(
        kernel_of(lora.attach, params, *lora.plain(params, adapters, initial, spec)),
        attached,
        **rounding,
    )


def test_pissa_and_olora_take_the_right_part_out_of_the_kernel():
    """PiSSA the best approximation of its rank, shared evenly; OLoRA the first terms of a QR
    decomposition."""
    kernel = np.random.default_rng(0).standard_normal((6, 9), np.float32)
    params = {"x": {"kernel": jnp.array(kernel)}}
    spec = lora.Spec(rank=3, alpha=4.5, targets="x", init="pissa")
    pair = lora.init(spec, params, jax.random.key(0))["x/kernel"]
    u, s, vt = np.linalg.svd(kernel)
    np.testing.assert_allclose(1.5 * pair["a"] @ pair["b"], (u[:, :3] * s[:3]) @ vt[:3], atol=1e-5)
    np.testing.assert_allclose(
        np.linalg.norm(pair["a"], axis=0), np.linalg.norm(pair["b"], axis=1), rtol=1e-5
    )
    np.testing.assert_allclose(
        jnp.linalg.norm(lora.residual(params, {"x/kernel": pair}, spec)["x"]["kernel"], 2),
        s[3],
        rtol=1e-5,
    )
    pair = lora.init(dataclasses.replace(spec, init="olora"), params, jax.random.key(0))["x/kernel"]
    q, r = np.linalg.qr(kernel.T)
    np.testing.assert_allclose(pair["a"] @ pair["b"], r[:3].T @ q[:, :3].T, atol=1e-5)
    np.testing.assert_allclose(pair["b"] @ pair["b"].T, np.eye(3), atol=1e-5)


def test_pissa_of_a_large_kernel_is_nearly_the_best_of_its_rank():
    """Singular values fall slowly, the worst case of subspace iteration."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((n, 96)))[0] for n in (96, 160))
    s = np.arange(1, 97) ** -0.5
    pair = lora.init(
        lora.Spec(8, 8.0, "x", init="pissa"),
        {"x": {"kernel": jnp.array(np.float32((u * s) @ v.T))}},
        jax.random.key(0),
    )
    held = np.linalg.norm(pair["x/kernel"]["a"] @ pair["x/kernel"]["b"]) ** 2
    assert 0.999 * np.sum(s[:8] ** 2) < held < 1.00001 * np.sum(s[:8] ** 2)


@pytest.fixture(scope="module")
def params():
    return quick_jit(MODEL.init)(jax.random.key(0))


def test_scanned_equals_unrolled_equals_rematerialised(params):
    """Losses and gradients, dropout's masks included; and only what the adapter holds has a
    gradient."""
    adapters = noisy(lora.init(ALL, params, jax.random.key(0)), ALL, params)

    def value_and_grad(**changes):
        model = dataclasses.replace(MODEL, **changes)

        def attached(a):
            return lora.attach(params, a, ALL, jax.random.key(3))

        return quick_jit(
            jax.value_and_grad(
                lambda a: jnp.mean(jax.nn.log_softmax(model.apply(attached(a), TOKENS))[..., 3])
            )
        )(adapters)

    expected = value_and_grad()
    for changes in ({"unroll": True}, {"remat": "full"}):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            expected,
            value_and_grad(**changes),
        )
    _, gradient = expected
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient))
    for path, rank in lora.ranks(ALL, params).items():
        beyond = np.arange(rank.max()) >= rank[..., None]
        assert not jnp.any(gradient[path]["a"] * beyond[..., None, :]) and not jnp.any(
            gradient[path]["b"] * beyond[..., :, None]
        )
    assert set(gradient) == {*lora.ranks(ALL, params), *trees.matching("norm", params)}


@pytest.mark.parametrize("axis", [-1, -2], ids=["output", "input"])
def test_dora_beside_zeros_in_a_kernel_has_finite_values_and_gradients_and_merges_to_zeros(axis):
    spec = lora.Spec(rank=2, targets="q_proj", dora=True)
    params = jax.jit(MODEL.init)(jax.random.key(0))
    (path,) = lora.abstract(spec, params)
    flat = trees.flatten(params)
    zeroed = jnp.moveaxis(jnp.moveaxis(flat[path], axis, 0).at[3].set(0), 0, axis)
    params = trees.unflatten({**flat, path: zeroed})
    adapters = lora.init(spec, params, jax.random.key(1))

    def summed(adapters):
        return MODEL.apply(lora.attach(params, adapters, spec), TOKENS).sum()

    value, gradients = quick_jit(jax.value_and_grad(summed))(adapters)
    assert np.isfinite(value) and all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
    np.testing.assert_allclose(value, MODEL.apply(params, TOKENS).sum(), rtol=1e-3)
    merged = trees.flatten(lora.merge(params, adapters, spec))[path]
    np.testing.assert_allclose(merged, zeroed, rtol=1e-5, atol=1e-6)
