from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kafjax.core.errors import UserError
from kafjax.training import TrainConfig
from kafjax.training.optimizers import (
    OPTIMIZERS,
    decayed,
    make,
    round_stochastically,
    warmup_cosine,
)
from kafjax.training.step import _updated


def test_schedule_rises_then_falls_to_its_floor():
    schedule = jax.vmap(warmup_cosine(0.5, 100, warmup_fraction=0.1, floor_fraction=0.2))
    rates = np.asarray(schedule(jnp.arange(101)))
    assert rates[0] > 0
    assert rates.argmax() == 10 and rates[10] == pytest.approx(0.5)
    assert (np.diff(rates[:11]) > 0).all() and (np.diff(rates[10:]) < 0).all()
    assert rates[55] == pytest.approx((0.5 + 0.1) / 2)  # half way down the cosine
    assert rates[100] == pytest.approx(0.1)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_schedule_of_a_very_short_run_is_positive(steps):
    schedule = warmup_cosine(1.0, steps, warmup_fraction=0.5)
    assert all(0 < float(schedule(step)) <= 1 for step in range(steps))


def test_norms_and_biases_do_not_decay_and_adapters_do():
    leaf = jnp.ones(1)
    params = {
        "q_proj": {"kernel": leaf, "bias": leaf},
        "norm": {"scale": leaf},
        "embed": {"embedding": leaf},
    }
    assert decayed(params) == {
        "q_proj": {"kernel": True, "bias": False},
        "norm": {"scale": False},
        "embed": {"embedding": True},
    }
    adapter = {"layers/norm/kernel": {"a": leaf, "b": leaf, "magnitude": leaf}}
    assert decayed(adapter) == {"layers/norm/kernel": {"a": True, "b": True, "magnitude": False}}


@pytest.mark.parametrize("lora_plus", [1.0, 16.0])
def test_equals_torch_adamw_with_clipping_decay_and_lora_plus(lora_plus):
    """LoRA+ (Hayou et al. 2024) is a parameter group with `lora_plus` times the rate, as in peft's
    `create_loraplus_optimizer`."""
    rng = np.random.default_rng(1)
    shapes = {
        "dense": {"kernel": (4, 3), "bias": (3,)},
        "norm": {"scale": (4,)},
        "x/kernel": {"a": (4, 2), "b": (2, 3), "magnitude": (3,)},
    }
    start = jax.tree.map(rng.standard_normal, shapes, is_leaf=lambda x: isinstance(x, tuple))
    start = jax.tree.map(lambda x: x.astype(np.float32), start)

    def random_like(scale):
        return jax.tree.map(
            lambda x: (scale * rng.standard_normal(x.shape)).astype(np.float32), start
        )

    gradients = [random_like(scale) for scale in (3, 0.1, 1, 5, 0.01)]
    schedule = warmup_cosine(0.1, len(gradients), warmup_fraction=0.4)

    b1, b2, eps = 0.8, 0.95, 1e-3
    optimizer = make(
        "adamw",
        schedule,
        weight_decay=0.3,
        clip_norm=1.0,
        lora_plus=lora_plus,
        b1=b1,
        b2=b2,
        eps=eps,
    )
    params, state = start, optimizer.init(start)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)

    theirs = jax.tree.map(lambda x: torch.nn.Parameter(torch.tensor(x)), start)
    groups = [
        {"params": [theirs["x/kernel"]["b"]], "weight_decay": 0.3, "times": lora_plus},
        {"params": [theirs["dense"]["kernel"], theirs["x/kernel"]["a"]], "weight_decay": 0.3},
        {
            "params": [
                theirs["dense"]["bias"],
                theirs["norm"]["scale"],
                theirs["x/kernel"]["magnitude"],
            ],
            "weight_decay": 0.0,
        },
    ]
    reference = torch.optim.AdamW(groups, lr=0.1, betas=(b1, b2), eps=eps)
    for step, gradient in enumerate(gradients):
        for group in reference.param_groups:
            group["lr"] = group.get("times", 1) * float(schedule(step))
        jax.tree.map(lambda p, g: setattr(p, "grad", torch.tensor(g)), theirs, gradient)
        torch.nn.utils.clip_grad_norm_(jax.tree.leaves(theirs), 1.0)
        reference.step()
    for ours, expected in zip(jax.tree.leaves(params), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(ours, expected.detach().numpy(), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    "wrong", [{"b1": 1.0}, {"b1": -0.1}, {"b2": float("nan")}, {"eps": 0.0}, {"eps": float("inf")}]
)
def test_adams_numbers_out_of_bounds_are_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(UserError, match=f"{name}={value}: must be"):
        TrainConfig(**wrong)


def run_ours(name: str, start, gradients, rate: float, weight_decay: float):
    """Parameters after a step with each of `gradients`, which are not clipped."""
    optimizer = make(name, lambda _: rate, weight_decay=weight_decay, clip_norm=1e9)
    params, state = start, optimizer.init(start)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_equals_torch_adafactor():
    rng = np.random.default_rng(1)

    def draw(scale):
        kernel, norm = rng.standard_normal((40, 48)), rng.standard_normal(40)
        return {
            "dense": {"kernel": (scale * kernel).astype(np.float32)},
            "norm": {"scale": (scale * norm).astype(np.float32)},
        }

    start, gradients, rate = draw(1), [draw(scale) for scale in (3, 0.1, 1, 5)], 0.05
    ours = run_ours("adafactor", start, gradients, rate, weight_decay=0.3)

    # torch multiplies the rate with the parameter's size, or with eps2 if that is larger: here it
    # always is, so sizes do not matter.
    eps2 = 1e3
    theirs = jax.tree.map(lambda x: torch.nn.Parameter(torch.tensor(x)), start)
    groups = [
        {"params": [theirs["dense"]["kernel"]], "weight_decay": 0.3 * eps2},
        {"params": [theirs["norm"]["scale"]], "weight_decay": 0.0},
    ]
    reference = torch.optim.Adafactor(groups, lr=rate / eps2, eps=(None, eps2))
    for gradient in gradients:
        jax.tree.map(lambda p, g: setattr(p, "grad", torch.tensor(g)), theirs, gradient)
        reference.step()
    for mine, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(mine, expected.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_adafactor_keeps_rows_and_columns_of_each_layer():
    stacked = {"kernel": jnp.ones((3, 64, 96))}
    sizes = sorted(
        leaf.size
        for leaf in jax.tree.leaves(make("adafactor", lambda _: 0.1).init(stacked))
        if leaf.size > 3
    )
    assert sizes == [3 * 64, 3 * 96]


DEEP = 40  # more layers than any other axis has, and than Adafactor asks of an axis that it factors


def stacked(rng, n_layers: int):
    """Parameters of a deep model and of an adapter, with vectors that are 2-D by stacking."""
    shapes = {
        "layers": {"q_proj": {"kernel": (n_layers, 36, 34)}, "norm": {"scale": (n_layers, 38)}},
        "layers/up_proj/kernel": {
            "a": (n_layers, 36, 4),
            "b": (n_layers, 4, 33),
            "magnitude": (n_layers, 33),
        },
        "final_norm": {"scale": (36,)},
    }

    def draw(shape):
        return jnp.array(rng.standard_normal(shape), jnp.float32)

    return jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))


def on_layers(change, tree):
    """`change` applied to what is stacked over layers."""
    return {
        name: value if name == "final_norm" else jax.tree.map(change, value)
        for name, value in tree.items()
    }


def assert_same(ours, theirs):
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(mine, other, rtol=2e-4, atol=2e-5)


@pytest.fixture(scope="module", params=OPTIMIZERS)
def deep(request):
    """An optimizer, parameters, two steps' gradients and the parameters after them."""
    rng = np.random.default_rng(4)
    start, *gradients = (stacked(rng, DEEP) for _ in range(3))
    return request.param, start, gradients, run_ours(request.param, start, gradients, 0.05, 0.1)


def test_a_layers_gradient_changes_no_other_layers_update(deep):
    name, start, gradients, expected = deep
    changed = [
        on_layers(lambda x: x.at[0].multiply(-100.0).at[0].add(7.0), gradient)
        for gradient in gradients
    ]
    ours = run_ours(name, start, changed, 0.05, 0.1)
    assert_same(on_layers(lambda x: x[1:], ours), on_layers(lambda x: x[1:], expected))
    assert not np.allclose(
        ours["layers"]["q_proj"]["kernel"][0], expected["layers"]["q_proj"]["kernel"][0]
    )


def test_permuted_layers_get_their_own_updates(deep):
    name, start, gradients, expected = deep

    def permute(tree):
        return on_layers(lambda x: x[np.random.default_rng(5).permutation(DEEP)], tree)

    assert_same(
        run_ours(name, permute(start), [permute(gradient) for gradient in gradients], 0.05, 0.1),
        permute(expected),
    )


def test_fewer_layers_get_the_same_updates(deep):
    name, start, gradients, expected = deep

    def few(tree):
        return on_layers(lambda x: x[:3], tree)

    assert_same(
        run_ours(name, few(start), [few(gradient) for gradient in gradients], 0.05, 0.1),
        few(expected),
    )


def test_stochastic_rounding_of_a_layer_depends_on_no_other_layer_and_not_on_their_number():
    rng = np.random.default_rng(6)
    x, update = (stacked(rng, DEEP) for _ in range(2))
    x = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), x)
    rounded = _updated(x, update, jax.random.key(0))
    other = _updated(x, on_layers(lambda leaf: leaf.at[0].add(5.0), update), jax.random.key(0))

    def few(tree):
        return on_layers(lambda leaf: leaf[:3], tree)

    for ours, theirs in zip(
        *map(
            jax.tree.leaves,
            (on_layers(lambda x: x[1:], rounded), on_layers(lambda x: x[1:], other)),
        ),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(
        *map(jax.tree.leaves, (_updated(few(x), few(update), jax.random.key(0)), few(rounded))),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_adafactor_never_factors_vectors():
    state = make("adafactor", lambda _: 0.1).init(
        {"layers": {"norm": {"scale": jnp.ones((DEEP, 64))}}}
    )
    assert sorted(leaf.size for leaf in jax.tree.leaves(state) if leaf.size > 1) == [DEEP * 64]


def test_muon_orthogonalises_each_layer_as_torch_does():
    rng = np.random.default_rng(2)
    start, gradient = (
        {"mlp": {"kernel": rng.standard_normal((3, 24, 40)).astype(np.float32)}} for _ in range(2)
    )
    ours = run_ours("muon", start, [gradient], 0.1, weight_decay=0.2)["mlp"]["kernel"]

    layers = [torch.nn.Parameter(torch.tensor(layer)) for layer in start["mlp"]["kernel"]]
    reference = torch.optim.Muon(layers, lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    for layer, of_layer in zip(layers, gradient["mlp"]["kernel"], strict=True):
        layer.grad = torch.tensor(of_layer)
    reference.step()
    for mine, expected, before in zip(ours, layers, start["mlp"]["kernel"], strict=True):
        change, expected_change = mine - before, expected.detach().numpy() - before
        # torch computes the orthogonalisation in bfloat16.
        np.testing.assert_allclose(
            change, expected_change, atol=0.03 * np.abs(expected_change).max()
        )


def test_muon_leaves_embeddings_and_scales_to_adam():
    rng = np.random.default_rng(3)
    tree = {
        "embed": {"embedding": rng.standard_normal((32, 16))},
        "norm": {"scale": rng.standard_normal(16)},
    }
    start = jax.tree.map(jnp.float32, tree)
    gradient = jax.tree.map(lambda x: x + 1, start)
    for mine, before, slope in zip(
        *map(jax.tree.leaves, (run_ours("muon", start, [gradient], 0.1, 0.0), start, gradient)),
        strict=True,
    ):
        # Adam's first step is the rate, and with Nesterov's momentum (Dozat 2016) as much again as
        # that looks ahead.
        np.testing.assert_allclose(
            mine - before, -0.1 * (1 + 0.9 * 0.1 / 0.19) * np.sign(slope), rtol=1e-3
        )


@given(
    st.floats(
        width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100
    ),
    st.integers(0, 2**31 - 1),
)
def test_stochastic_rounding_gives_a_neighbour_and_keeps_what_is_exact(x, seed):
    x = np.float32(x)
    below, above = neighbours(x)
    rounded = float(_round(jnp.full(8, x), jax.random.key(seed))[0])
    assert rounded in (below, above)
    assert float(_round(jnp.full(8, below, jnp.float32), jax.random.key(seed))[0]) == below


@pytest.mark.parametrize("x", [1.001, -3.14159, 1e-3, 123.456, 1 + 1 / 1024])
def test_stochastic_rounding_is_unbiased(x):
    n, x = 40_000, np.float32(x)
    mean = np.asarray(round_stochastically(jnp.full(n, x), jax.random.key(7)), np.float64).mean()
    below, above = neighbours(x)
    share = (float(x) - below) / (above - below)
    error = abs(above - below) * np.sqrt(share * (1 - share) / n)
    assert 0 < share < 1 and abs(mean - float(x)) < 4.5 * error


def test_stochastic_rounding_keeps_what_is_not_finite():
    rounded = round_stochastically(
        jnp.array([jnp.inf, -jnp.inf, jnp.nan], jnp.float32), jax.random.key(0)
    )
    np.testing.assert_array_equal(np.asarray(rounded, np.float32), [np.inf, -np.inf, np.nan])


_round = jax.jit(round_stochastically)


def neighbours(x: np.float32) -> tuple[float, float]:
    """The bfloat16 numbers on both sides of `x`, nearest to zero first."""
    toward_zero = x.view(np.uint32) & np.uint32(0xFFFF0000)
    away = toward_zero + np.uint32(0x10000)
    return float(toward_zero.view(np.float32)), float(away.view(np.float32))
