"""Padding changes nothing: an adapter in a lane or a slot computes what it computes alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kafjax import lora
from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.models import Decoder
from kafjax.ops.linear import AdapterSlots, LoRAWeight, linear
from tests.oracles import quick_jit, random_tokens
from tests.shapes import ONE_KEY_HEAD

MODEL = Decoder(ONE_KEY_HEAD)
SPECS = (lora.Spec(2, 8.0, "q_proj"), lora.Spec(5, 10.0), lora.Spec(3, 1.0, "(v|down)_proj"))


@pytest.fixture(scope="module")
def params():
    return quick_jit(MODEL.init)(jax.random.key(0))


def trained(spec, params, seed):
    """An adapter with something in `b`."""
    rng = np.random.default_rng(seed)

    def draw(x):
        return rng.normal(0, 0.3, x.shape).astype(np.float32)

    return jax.tree.map(draw, lora.abstract(spec, params))


def test_layout_is_the_union_at_the_bucket_of_the_highest_rank(params):
    shapes = lora.lanes.padded_shapes(SPECS, params)
    assert set(shapes) == set(lora.abstract(SPECS[1], params))
    assert (
        {pair["a"].shape[-1] for pair in shapes.values()}
        == {pair["b"].shape[-2] for pair in shapes.values()}
        == {8}
    )
    assert set(lora.lanes.padded_shapes(SPECS[:1], params)) == {"layers/attn/q_proj/kernel"}
    assert [lora.lanes.bucket(rank) for rank in (1, 8, 9, 16, 17, 100)] == [8, 8, 16, 16, 32, 128]


@settings(max_examples=20)
@given(
    rank=st.integers(1, 8),
    targets=st.sampled_from(["q_proj", "(k|up)_proj", "mlp", "_proj"]),
    seed=st.integers(0, 99),
)
def test_unpad_gives_back_what_was_padded_and_the_rest_is_zero(params, rank, targets, seed):
    spec = lora.Spec(rank, targets=targets)
    adapters = trained(spec, params, seed)
    padded = lora.lanes.pad(adapters, lora.lanes.padded_shapes([spec, lora.Spec(8)], params))
    again = lora.lanes.unpad(padded, lora.abstract(spec, params))
    assert jax.tree.all(jax.tree.map(np.array_equal, again, adapters))

    def squares(tree):
        return sum(float(np.square(x, dtype=np.float64).sum()) for x in jax.tree.leaves(tree))

    assert squares(padded) == pytest.approx(squares(adapters), rel=1e-12)


def test_what_does_not_fit_is_told(params):
    shapes = lora.lanes.padded_shapes(SPECS[:1], params)
    with pytest.raises(UserError, match="no room for 'layers/attn/k_proj/kernel'"):
        lora.lanes.pad(trained(SPECS[1], params, 0), shapes)
    with pytest.raises(UserError, match="rank=9 is above 8"):
        lora.lanes.pad(trained(lora.Spec(9, targets="q_proj"), params, 0), shapes)
    with pytest.raises(UserError, match="rank=9 is above 8"):
        lora.lanes.padded_shapes([lora.Spec(9, targets="q_proj")], params, rank=8)
    with pytest.raises(UserError, match="empty"):
        lora.lanes.padded_shapes([], params)


def test_gradients_of_the_padding_are_exactly_zero(params):
    """Padding therefore stays zero under any optimizer."""
    shapes = lora.lanes.padded_shapes(SPECS, params)
    tokens = random_tokens(0, (2, 6), ONE_KEY_HEAD.vocab_size)
    for spec in SPECS:
        padded, scales = (
            lora.lanes.pad(trained(spec, params, 1), shapes),
            lora.lanes.scales(spec, params, shapes),
        )

        def loss(adapters, scales):
            return jnp.sum(
                jnp.sin(MODEL.apply(lora.lanes.attach(params, adapters, scales), tokens))
            )

        gradients = quick_jit(jax.grad(loss))(padded, scales)
        kept = lora.lanes.pad(lora.lanes.unpad(gradients, lora.abstract(spec, params)), shapes)
        assert jax.tree.all(
            jax.tree.map(
                lambda g, k: np.array_equal(g, k) and np.isfinite(g).all(), gradients, kept
            )
        )
        assert all(
            np.any(leaf)
            for leaf in jax.tree.leaves(lora.lanes.unpad(gradients, lora.abstract(spec, params)))
        )


def test_rows_of_one_batch_use_their_own_adapters(params):
    shapes, tokens = (
        lora.lanes.padded_shapes(SPECS, params),
        random_tokens(1, (5, 7), ONE_KEY_HEAD.vocab_size),
    )
    slots = lora.lanes.empty_slots(params, shapes, n_slots=4)
    adapters = [trained(spec, params, seed) for seed, spec in enumerate(SPECS)]
    for slot, (spec, adapter) in enumerate(zip(SPECS, adapters, strict=True)):
        slots = lora.lanes.put(
            slots, slot, lora.lanes.pad(adapter, shapes), lora.lanes.scales(spec, params, shapes)
        )
    assert lora.lanes.n_slots(slots) == 4 and lora.lanes.n_slots(params) == 0
    apply = quick_jit(MODEL.apply)
    rows = [2, 0, 3, 1, 2]
    logits_BxTxV = apply(lora.lanes.of_rows(slots, rows), tokens)
    alone = [
        *(
            lora.attach(params, adapter, spec)
            for adapter, spec in zip(adapters, SPECS, strict=True)
        ),
        params,
    ]
    for row, slot in enumerate(rows):
        np.testing.assert_allclose(
            logits_BxTxV[row], apply(alone[slot], tokens[row : row + 1])[0], atol=2e-5
        )
    with pytest.raises(UserError, match="no adapter slot 4: these parameters have 4, 0 to 3"):
        lora.lanes.of_rows(slots, [0, 4])


def test_swapping_an_adapter_compiles_nothing_and_copies_no_base(params):
    shapes, tokens = (
        lora.lanes.padded_shapes(SPECS, params),
        random_tokens(1, (2, 7), ONE_KEY_HEAD.vocab_size),
    )
    apply = quick_jit(MODEL.apply)
    slots = lora.lanes.empty_slots(params, shapes, n_slots=2)
    answers, programs = [], lora.lanes._put._cache_size()
    for seed, spec in enumerate(SPECS):
        slots = lora.lanes.put(
            slots,
            1,
            lora.lanes.pad(trained(spec, params, seed), shapes),
            lora.lanes.scales(spec, params, shapes),
        )
        answers.append(np.asarray(apply(lora.lanes.of_rows(slots, [1, 0]), tokens)))
    assert apply._cache_size() == 1 and lora.lanes._put._cache_size() == programs + 1
    assert not np.array_equal(answers[0][0], answers[1][0]) and np.array_equal(
        answers[0][1], answers[1][1]
    )
    bases = {
        path: leaf.base if isinstance(leaf, AdapterSlots) else leaf
        for path, leaf in trees.flatten(slots).items()
    }
    assert all(bases[path] is leaf for path, leaf in trees.flatten(params).items())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_product_with_the_base_is_one_for_all_lanes(dtype):
    """`[lanes, tokens, in]` meets the kernel in one product under vmap, forward and backward, not
    in one a lane."""
    n_lanes, n_tokens, n_in, n_out, rank = 3, 5, 8, 6, 2

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, dtype)

    def loss(a, b, x, base):
        def lane(a, b, x):
            return linear(x, LoRAWeight(base, a, b))

        return jnp.sum(jnp.sin(jax.vmap(lane)(a, b, x)))

    arguments = (
        shape(n_lanes, n_in, rank),
        shape(n_lanes, rank, n_out),
        shape(n_lanes, n_tokens, n_in),
        shape(n_in, n_out),
    )
    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*arguments)
    with_base = [
        (tuple(v.aval.shape for v in e.invars), e.params["dimension_numbers"][1])
        for e in _equations(jaxpr.jaxpr)
        if e.primitive.name == "dot_general" and (n_in, n_out) in [v.aval.shape for v in e.invars]
    ]
    assert len(with_base) == 2  # forward, and the gradient of x
    assert {batch for _, batch in with_base} == {((), ())}
    assert all(n_lanes in shapes[0] and n_tokens in shapes[0] for shapes, _ in with_base)
    # A kernel that every lane had its own copy of would be a batch dimension.
    assert not [
        v for e in _equations(jaxpr.jaxpr) for v in e.outvars if v.aval.shape[-2:] == (n_in, n_out)
    ]


def _equations(jaxpr):
    def is_jaxpr(value):
        return hasattr(value, "eqns") or hasattr(value, "jaxpr")

    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(value):
                yield from _equations(getattr(value, "jaxpr", value))
