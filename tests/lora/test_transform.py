"""The transform by its laws: fresh adapters change nothing, attached equals merged, the base stays
as it is."""

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
from kafjax.core.errors import UserError
from kafjax.models import Decoder, DecoderConfig, Encoder, EncoderConfig
from kafjax.ops.linear import LoRAWeight, linear

CONFIG = DecoderConfig(
    vocab_size=97,
    hidden_size=24,
    mlp_size=44,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    sliding=(True, False, True),
    window=4,
    attention_scale=8**-0.5,
)
MODEL = Decoder(CONFIG)
SPEC = lora.Spec(rank=4, alpha=6.0)
TOKENS = random_tokens(0, (2, 9), 97)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def trained(spec, params, seed=1):
    """Adapters as after some training: `b` is not zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.array(0.2 * rng.standard_normal(x.shape, np.float32)),
        lora.abstract(spec, params),
    )


@pytest.fixture(scope="module")
def params():
    return quick_jit(MODEL.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def apply():
    return quick_jit(MODEL.apply)


def test_a_fresh_adapter_changes_no_logit(params, apply):
    adapters = quick_jit(lambda key: lora.init(SPEC, params, key))(jax.random.key(1))
    np.testing.assert_array_equal(
        apply(lora.attach(params, adapters, SPEC), TOKENS), apply(params, TOKENS)
    )


def test_init_draws_as_peft_does_and_each_layer_its_own():
    params = {"layers": {"q_proj": {"kernel": jax.ShapeDtypeStruct((2, 400, 600), jnp.float32)}}}
    pair = lora.init(lora.Spec(rank=50), params, jax.random.key(0))["layers/q_proj/kernel"]
    a = pair["a"]
    assert a.dtype == pair["b"].dtype == jnp.float32
    assert float(jnp.abs(a).max()) <= 400**-0.5
    assert float(jnp.abs(a).max()) > 0.99 * 400**-0.5
    np.testing.assert_allclose(a.std(), 400**-0.5 / 3**0.5, rtol=0.02)  # of a uniform distribution
    assert abs(float(jnp.corrcoef(a[0].ravel(), a[1].ravel())[0, 1])) < 0.02
    assert not pair["b"].any()


def test_init_depends_on_the_key_and_abstract_describes_it(params):
    init = quick_jit(lambda key: lora.init(SPEC, params, key))
    one, other = (init(jax.random.key(i)) for i in (0, 1))

    def describe(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    assert describe(one) == describe(lora.abstract(SPEC, MODEL.abstract_params()))
    assert all((one[path]["a"] != other[path]["a"]).any() for path in one)
    up, gate = one["layers/mlp/up_proj/kernel"]["a"], one["layers/mlp/gate_proj/kernel"]["a"]
    assert (up != gate).any()  # of equal shape, from different streams


@settings(max_examples=15, deadline=None)
@given(
    targets=st.sets(st.sampled_from(PROJECTIONS), min_size=1),
    more=st.sets(st.sampled_from(PROJECTIONS)),
)
def test_adding_a_target_changes_no_other(targets, more):
    abstract = MODEL.abstract_params()
    spec = lora.Spec(rank=2, targets="|".join(sorted(targets)))
    wider = lora.Spec(rank=2, targets="|".join(sorted(targets | more)))
    few, many = (lora.init(s, abstract, jax.random.key(3)) for s in (spec, wider))
    assert {path.split("/")[-2] for path in few} == targets
    assert {path.split("/")[-2] for path in many} == targets | more
    for path, pair in few.items():
        np.testing.assert_array_equal(pair["a"], many[path]["a"])


@settings(max_examples=15, deadline=None)
@given(
    rank=st.sampled_from([1, 5]),
    alpha=st.floats(0.01, 64),
    shape=st.sampled_from([(5, 9), (9, 5), (2, 5, 9)]),
)
def test_attached_and_merged_kernels_multiply_alike(rank, alpha, shape):
    params = {"x": {"kernel": np.random.default_rng(0).standard_normal(shape, np.float32)}}
    spec = lora.Spec(rank=rank, alpha=alpha, targets="x")
    adapters = trained(spec, params)
    attached = lora.attach(params, adapters, spec)["x"]["kernel"]
    merged = lora.merge(params, adapters, spec)["x"]["kernel"]
    multiply = jax.vmap(linear, (None, 0)) if len(shape) == 3 else linear
    np.testing.assert_allclose(
        multiply(np.eye(shape[-2], dtype=np.float32), attached), merged, rtol=1e-5, atol=1e-5
    )
    update = (
        np.asarray(adapters["x/kernel"]["a"]) @ np.asarray(adapters["x/kernel"]["b"]) * alpha / rank
    )
    np.testing.assert_allclose(merged - params["x"]["kernel"], update, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("targets", [SPEC.targets, "q_proj|v_proj", "mlp"])
def test_attached_logits_equal_merged_logits(params, apply, targets):
    spec = dataclasses.replace(SPEC, targets=targets)
    adapters = trained(spec, params)
    attached = quick_jit(lambda p, a: MODEL.apply(lora.attach(p, a, spec), TOKENS))(
        params, adapters
    )
    np.testing.assert_allclose(
        attached, apply(lora.merge(params, adapters, spec), TOKENS), atol=2e-5
    )
    assert np.abs(attached - apply(params, TOKENS)).max() > 0.1


def test_attach_and_merge_leave_the_base_alone(params):
    """Parameters without an adapter, and each base, are the very same arrays: no copy."""
    spec = dataclasses.replace(SPEC, targets="q_proj")
    adapters = trained(spec, params)
    path = "layers/attn/q_proj/kernel"
    before = trees.flatten(params)
    attached, merged = (
        trees.flatten(change(params, adapters, spec)) for change in (lora.attach, lora.merge)
    )
    assert set(attached) == set(merged) == set(before)
    assert all(attached[p] is before[p] and merged[p] is before[p] for p in before if p != path)
    assert isinstance(attached[path], LoRAWeight) and attached[path].base is before[path]
    assert attached[path].a is adapters[path]["a"]
    # alpha / rank
    np.testing.assert_array_equal(attached[path].b, adapters[path]["b"] * np.float32(1.5))
    assert trees.flatten(params)[path] is before[path]


def test_bfloat16_base(params):
    """The scale is applied in float32, the merge adds in float32 and rounds once, and `drift` says
    what that costs."""
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    adapters = trained(SPEC, low)
    attached, merged = (
        trees.flatten(lora.attach(low, adapters, SPEC)),
        trees.flatten(lora.merge(low, adapters, SPEC)),
    )
    drift = lora.drift(low, adapters, SPEC)
    assert set(drift) == set(adapters)
    for path, pair in adapters.items():
        assert attached[path].b.dtype == jnp.float32 and attached[path].base.dtype == jnp.bfloat16
        update = np.einsum("lir,lro->lio", np.float64(pair["a"]), np.float64(pair["b"])) * 1.5
        exact = np.float64(trees.flatten(low)[path]) + update
        assert merged[path].dtype == jnp.bfloat16
        lost = np.abs(exact - np.float64(merged[path]))
        assert (lost <= 2.0**-8 * np.abs(exact) + 1e-6).all()  # half a unit in the last place
        np.testing.assert_allclose(drift[path], lost.max(), rtol=1e-2)
    assert set(lora.drift(params, adapters, SPEC).values()) == {0.0}
    model = dataclasses.replace(MODEL, dtype=jnp.bfloat16)
    exact = quick_jit(MODEL.apply)(
        lora.merge(jax.tree.map(lambda x: x.astype(jnp.float32), low), adapters, SPEC), TOKENS
    )
    apply = quick_jit(model.apply)
    error = {
        name: float(jnp.sqrt(jnp.mean((apply(change(low, adapters, SPEC), TOKENS) - exact) ** 2)))
        for name, change in {"attached": lora.attach, "merged": lora.merge}.items()
    }
    assert error["attached"] < 1.3 * error["merged"]  # no worse than rounding the sum
    assert error["merged"] < 0.05 * float(jnp.std(exact))


@pytest.mark.parametrize(
    "model", [MODEL, Encoder(EncoderConfig(50, 16, 32, 2, 4))], ids=["decoder", "encoder"]
)
def test_adapters_inherit_the_axes_of_their_kernels(model):
    abstract = model.abstract_params()
    adapters = lora.abstract(SPEC, abstract)
    axes = lora.axes(adapters, model.axes())
    kernels = trees.flatten(model.axes())
    assert set(axes) == set(adapters)
    for path, pair in adapters.items():
        layers, n_in, n_out = kernels[path]
        assert axes[path] == {"a": (layers, n_in, None), "b": (layers, None, n_out)}
        assert all(len(axes[path][name]) == pair[name].ndim for name in pair)


def test_an_encoder_takes_adapters_too():
    model = Encoder(EncoderConfig(50, 16, 32, 2, 4), unroll=False)
    params = quick_jit(model.init)(jax.random.key(0))
    tokens, mask = random_tokens(0, (2, 5), 50), jnp.ones((2, 5), bool)
    adapters, apply = trained(SPEC, params), quick_jit(model.apply)
    attached = apply(lora.attach(params, adapters, SPEC), tokens, mask)
    np.testing.assert_allclose(
        attached, apply(lora.merge(params, adapters, SPEC), tokens, mask), atol=1e-5
    )
    assert np.abs(attached - apply(params, tokens, mask)).max() > 1e-2


def change(adapters, path, **parts):
    return {**adapters, path: {**adapters.get(path, {}), **parts}}


@pytest.mark.parametrize("use", [lora.attach, lora.merge, lora.drift])
def test_base_adapters_and_spec_that_do_not_fit_are_refused_by_name(params, use):
    adapters = trained(SPEC, params)
    path = "layers/mlp/up_proj/kernel"
    without = {p: pair for p, pair in adapters.items() if p != path}
    for wrong, spec, named in (
        (without, SPEC, f"nothing for '{path}'"),
        (adapters, dataclasses.replace(SPEC, targets="attn"), "no target of this base"),
        (
            change(adapters, "layers/new/kernel", a=jnp.zeros(1)),
            SPEC,
            "'layers/new/kernel', which is no target",
        ),
        (adapters, dataclasses.replace(SPEC, rank=5), r"\[3, 24, 4\].*rank=5 needs \[3, 24, 5\]"),
        (
            change(adapters, path, b=jnp.zeros((3, 4, 45))),
            SPEC,
            rf"'{path}/b' has shape \[3, 4, 45\].* needs \[3, 4, 44\]",
        ),
        ({**adapters, path: {"a": adapters[path]["a"]}}, SPEC, rf"holds \['a'\] for '{path}'"),
    ):
        with pytest.raises(UserError, match=named):
            use(params, wrong, spec)


def test_a_kernel_takes_one_adapter_at_a_time(params):
    adapters = trained(SPEC, params)
    attached = lora.attach(params, adapters, SPEC)
    with pytest.raises(UserError, match="already carries an adapter"):
        lora.attach(attached, adapters, SPEC)
    with pytest.raises(UserError, match="already carries an adapter"):
        lora.init(SPEC, attached, jax.random.key(0))
