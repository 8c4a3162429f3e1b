"""Sums of adapters are sums of their updates, and a compressed one is the best of its rank: against
dense matrices."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kafjax import lora
from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.lora import Spec

SHAPES = {
    "layers": {
        "attn": {"q_proj": {"kernel": (3, 8, 12)}, "k_proj": {"kernel": (3, 8, 6)}},
        "mlp": {"up_proj": {"kernel": (3, 8, 10)}},
    },
    "extra": {"kernel": (7, 9)},
    "embed": {"embedding": (20, 8)},
}
_RNG = np.random.default_rng(0)
PARAMS = jax.tree.map(
    lambda s: _RNG.standard_normal(s, np.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
)
SPECS = [
    Spec(rank=2, alpha=3.0, targets="(q|k)_proj"),
    Spec(rank=3, alpha=5.0, targets="(q|up)_proj", rslora=True, layers=(0, 2)),
    Spec(
        rank=4,
        alpha=1.0,
        targets="all-linear",
        rank_pattern={"layers/1/": 2, "up_proj": 5},
        alpha_pattern={"k_proj": 9.0},
    ),
    Spec(rank=1, alpha=2.0, targets="extra|embed|up_proj", dropout=0.1),
]
TERMS = st.lists(
    st.tuples(st.sampled_from(SPECS), st.floats(-3, 3), st.integers(0, 9)), min_size=1, max_size=3
)


def random_adapter(spec: Spec, seed: int) -> lora.Adapters:
    rng = np.random.default_rng(seed)
    # its zeros beyond a layer's own rank stay
    fresh = lora.init(spec, PARAMS, jax.random.key(seed))
    rank = lora.ranks(spec, PARAMS)

    def of(path: str) -> dict[str, jax.Array]:
        b = rng.standard_normal(fresh[path]["b"].shape, np.float32)
        own = np.arange(b.shape[-2]) < rank[path][..., None]
        return {"a": fresh[path]["a"], "b": jnp.asarray(b * own[..., None])}

    return {path: of(path) for path in fresh}


def update(adapters: lora.Adapters, spec: Spec) -> dict[str, np.ndarray]:
    """Returns the dense update of each kernel."""
    zero = jax.tree.map(np.zeros_like, PARAMS)
    merged = lora.merge(zero, adapters, spec)
    return {path: np.asarray(leaf, np.float64) for path, leaf in trees.flatten(merged).items()}


@settings(max_examples=25)
@given(TERMS)
def test_a_weighted_sum_merges_to_the_sum_of_the_updates(drawn):
    terms = [(random_adapter(spec, seed), spec, weight) for spec, weight, seed in drawn]
    adapters, spec = lora.weighted_sum(PARAMS, terms)
    updates = [(update(of_term, own), weight) for of_term, own, weight in terms]
    for path, leaf in update(adapters, spec).items():
        np.testing.assert_allclose(
            leaf, sum(weight * of_term[path] for of_term, weight in updates), atol=2e-5
        )
    rank = lora.ranks(spec, PARAMS)
    assert {
        path: {name: leaf.shape for name, leaf in pair.items()} for path, pair in adapters.items()
    } == {
        path: {
            "a": (*leaf.shape[:-1], rank[path].max()),
            "b": (*leaf.shape[:-2], rank[path].max(), leaf.shape[-1]),
        }
        for path, leaf in trees.flatten(PARAMS).items()
        if path in rank
    }
    for path, own in rank.items():
        np.testing.assert_array_equal(
            own, sum(lora.ranks(s, PARAMS).get(path, np.zeros_like(own)) for s, _, _ in drawn)
        )
        assert np.all(lora.scales(spec, PARAMS)[path] == (own > 0))


def test_an_adapter_minus_itself_is_nothing():
    adapters = random_adapter(SPECS[2], 1)
    difference, spec = lora.weighted_sum(
        PARAMS, [(adapters, SPECS[2], 1.0), (adapters, SPECS[2], -1.0)]
    )
    assert max(np.abs(leaf).max() for leaf in update(difference, spec).values()) < 1e-6
    smaller, spec = lora.compress(PARAMS, difference, spec, 1)
    assert max(np.abs(leaf).max() for leaf in update(smaller, spec).values()) < 1e-6


@pytest.mark.parametrize("rank", [1, 2, 3, 20])
@pytest.mark.parametrize("spec", SPECS)
def test_compression_is_the_truncated_svd_of_the_dense_update(spec, rank):
    adapters = random_adapter(spec, 2)
    smaller, small_spec = lora.compress(PARAMS, adapters, spec, rank)
    before, after = update(adapters, spec), update(smaller, small_spec)
    for path, own in lora.ranks(spec, PARAMS).items():
        u, s, vt = np.linalg.svd(before[path], full_matrices=False)
        best = (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]
        np.testing.assert_allclose(after[path], best, atol=2e-5)
        np.testing.assert_array_equal(lora.ranks(small_spec, PARAMS)[path], np.minimum(own, rank))


def test_a_sum_wider_than_the_kernel_comes_back_to_it_exactly():
    adapters = random_adapter(SPECS[0], 3)
    wide, spec = lora.weighted_sum(PARAMS, [(adapters, SPECS[0], 1.0)] * 5)
    assert wide["layers/attn/k_proj/kernel"]["a"].shape == (3, 8, 10)  # of a kernel [8, 6]
    narrow, narrow_spec = lora.compress(PARAMS, wide, spec, 10)
    assert narrow["layers/attn/k_proj/kernel"]["a"].shape == (3, 8, 6)
    for path, leaf in update(narrow, narrow_spec).items():
        np.testing.assert_allclose(leaf, update(wide, spec)[path], atol=2e-5)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"dora": True}, "dora=True"),
        ({"init": "pissa"}, "init='pissa'"),
        ({"trained": "extra"}, "trained='extra'"),
        ({"token_rows": (1, 3)}, r"token_rows=\(1, 3\)"),
    ],
)
def test_what_is_no_sum_is_refused_by_name(changed, told):
    spec = dataclasses.replace(SPECS[0], **changed)
    adapters = lora.init(spec, PARAMS, jax.random.key(0))
    with pytest.raises(UserError, match=f"{told} cannot be added"):
        lora.weighted_sum(PARAMS, [(adapters, spec, 1.0)])
    with pytest.raises(UserError, match=f"{told} cannot be added or compressed"):
        lora.compress(PARAMS, adapters, spec, 1)


def test_bad_input_is_said():
    adapters = random_adapter(SPECS[0], 0)
    with pytest.raises(UserError, match="nothing to add"):
        lora.weighted_sum(PARAMS, [])
    with pytest.raises(UserError, match="weighted with nan"):
        lora.weighted_sum(PARAMS, [(adapters, SPECS[0], float("nan"))])
    with pytest.raises(UserError, match="rank 0"):
        lora.compress(PARAMS, adapters, SPECS[0], 0)
    other = {
        **PARAMS,
        "layers": {
            **PARAMS["layers"],
            "attn": {"q_proj": {"kernel": np.zeros((3, 9, 12), np.float32)}},
        },
    }
    with pytest.raises(UserError, match="another model"):
        lora.weighted_sum(other, [(adapters, dataclasses.replace(SPECS[0], targets="q_proj"), 1.0)])
