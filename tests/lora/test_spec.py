"""A spec says what it adapts; what it cannot adapt is refused with a name."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest

from kafjax import lora
from kafjax.core.errors import UserError

KERNELS = {
    "layers": {
        "attn": {
            "q_proj": {"kernel": (3, 8, 12)},
            "o_proj": {"kernel": (3, 12, 8)},
            "q_norm": {"scale": (3, 4)},
        },
        "mlp": {"up_proj": {"kernel": (3, 8, 20), "bias": (3, 20)}},
    },
    "embed": {"embedding": (50, 8)},
    "head": {"kernel": (8, 50)},
}
PARAMS = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s, jnp.float32), KERNELS, is_leaf=lambda x: isinstance(x, tuple)
)
Q, OUT, UP, HEAD = (
    "layers/attn/q_proj/kernel",
    "layers/attn/o_proj/kernel",
    "layers/mlp/up_proj/kernel",
    "head/kernel",
)
EMBED = "embed/embedding"


@pytest.mark.parametrize(
    ("targets", "paths"),
    [
        (lora.Spec().targets, {Q, OUT, UP}),
        ("q_proj", {Q}),
        ("attn", {Q, OUT}),
        (r"(o|up)_proj", {OUT, UP}),
        (r"^layers/", {Q, OUT, UP}),
        ("head", {HEAD}),
        ("embed", {EMBED}),
        ("", {Q, OUT, UP, HEAD, EMBED}),
    ],
)
def test_targets_are_searched_in_the_paths_of_kernels_and_embeddings(targets, paths):
    adapters = lora.abstract(lora.Spec(rank=2, targets=targets), PARAMS)
    assert set(adapters) == paths


def test_shapes_stand_behind_the_layer_axis_where_there_is_one():
    adapters = lora.abstract(lora.Spec(rank=2, targets="q_proj|head"), PARAMS)
    assert {path: (pair["a"].shape, pair["b"].shape) for path, pair in adapters.items()} == {
        Q: ((3, 8, 2), (3, 2, 12)),
        HEAD: ((8, 2), (2, 50)),
    }


@pytest.mark.parametrize("targets", ["q_porj", "qproj", "(q|v)_projection"])
def test_targets_that_match_nothing_get_the_nearest_path(targets):
    with pytest.raises(UserError, match=f"match no kernel; nearest: {Q}"):
        lora.abstract(lora.Spec(rank=2, targets=targets), PARAMS)


@pytest.mark.parametrize(
    ("targets", "other"), [("q_norm", "q_norm/scale"), ("bias", "up_proj/bias")]
)
def test_targets_that_match_no_kernel_but_something_else_say_so(targets, other):
    with pytest.raises(UserError, match=f"match no kernel, only '.*{other}'"):
        lora.abstract(lora.Spec(rank=2, targets=targets), PARAMS)


def test_a_tree_without_kernels_is_refused():
    with pytest.raises(UserError, match="no kernels"):
        lora.abstract(lora.Spec(rank=2), {"norm": {"scale": PARAMS["embed"]["embedding"]}})


def test_a_rank_above_the_smaller_side_names_the_target():
    lora.abstract(lora.Spec(rank=8, targets="q_proj"), PARAMS)
    with pytest.raises(UserError, match=rf"rank=9 .*'{Q}', a kernel \[8, 12\]"):
        lora.abstract(lora.Spec(rank=9, targets="q_proj"), PARAMS)


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "4", None])
def test_a_rank_that_is_no_count_is_refused(rank):
    with pytest.raises(UserError, match="rank="):
        lora.Spec(rank=rank)


@pytest.mark.parametrize("alpha", [0, -1.0, math.nan, math.inf, "16", None])
def test_an_alpha_that_is_no_size_is_refused(alpha):
    with pytest.raises(UserError, match="alpha="):
        lora.Spec(alpha=alpha)


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        ("(q", "not a regular expression"),
        ("*", "not a regular expression"),
        (None, "must be text"),
        (["q_proj"], "must be text"),
    ],
)
def test_targets_that_are_no_regular_expression_are_refused(targets, told):
    with pytest.raises(UserError, match=f"targets=.*{told}"):
        lora.Spec(targets=targets)
