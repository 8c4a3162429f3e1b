"""Prompts that branch off one trunk: the replies and logits of each prompt alone, for fewer
tokens."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kafjax.core.errors import UserError
from kafjax.generation import Generation, Generator, Sampling
from kafjax.generation.branches import n_shared, prefill_branches
from kafjax.generation.decode import prefill
from kafjax.models import Decoder

LINES = [
    "A fox is an animal.\n",
    "The mill stood by the river.\n",
    "Two hens share a yard.\n",
    "A goose is grey.\n",
]
PREFIX = "The lamp stood by the window.\n"
GREEDY = Sampling(max_new_tokens=20, stop=())


def group(question: str, depths=(0, 1, 2, 4)) -> list[str]:
    return ["".join(LINES[:k]) + question for k in depths]


GROUPS = [
    group("Who is grey?"),
    group("q"),
    group("What stood by the river, and where?", (4, 0)),
    [],
    group("Who?", (3,)),
]


def test_groups_without_prompts_get_no_replies(model, tokenizer, params):
    generator = Generator(model, tokenizer)
    assert generator.generate_branches(params, [[], []], GREEDY) == [[], []]


@pytest.fixture(scope="module")
def replies_alone(generator, params):
    """`replies_alone(prefix)`: replies to the prompts of each group, generated once per prefix."""

    @functools.cache
    def generate(prefix: str | None) -> list[list[Generation]]:
        cached = None if prefix is None else generator.prefix(params, prefix)
        return [generator.generate(params, prompts, GREEDY, cached) for prompts in GROUPS]

    return generate


@pytest.mark.parametrize(
    ("prefix", "batch"),
    [
        (PREFIX, 32),
        (PREFIX, 4),
        (PREFIX, 1),
        (None, 32),
        (None, 4),
        (None, 1),
        # one equality of decoding with the programs of a user
        pytest.param(PREFIX, 8, marks=pytest.mark.optimised),
    ],
)
def test_replies_are_those_of_each_prompt_alone(
    model, tokenizer, params, replies_alone, batch, prefix
):
    generator = Generator(model, tokenizer, batch)
    cached = None if prefix is None else generator.prefix(params, prefix)
    branched = generator.generate_branches(params, GROUPS, GREEDY, cached)
    alone = replies_alone(prefix)
    assert len({reply.tokens for replies in alone for reply in replies}) > 5
    for ours, theirs in zip(branched, alone, strict=True):
        assert [(r.text, r.tokens, r.prompt_tokens) for r in ours] == [
            (r.text, r.tokens, r.prompt_tokens) for r in theirs
        ]
        assert all(a.cached_tokens >= b.cached_tokens for a, b in zip(ours, theirs, strict=True))
    assert branched[0][2].cached_tokens > alone[0][2].cached_tokens + generator.count(
        "".join(LINES[:1])
    )


def test_other_weights_a_group_of_equals_and_progress(generator, params):
    told = []
    replies = generator.generate_branches(
        params, [["Who?"] * 3, ["What?"]], GREEDY, advance=told.append
    )
    assert len({reply.tokens for reply in replies[0]}) == 1 and sum(told) == 2
    assert generator.generate_branches(params, [], GREEDY) == []
    with pytest.raises(UserError, match="other weights"):
        generator.generate_branches(
            {**params, "x": jnp.zeros(1)}, GROUPS, GREEDY, generator.prefix(params, PREFIX)
        )


@pytest.mark.parametrize("window", [7, 64])
def test_logits_of_a_branch_are_those_of_its_prompt(model, params, window):
    """Past and within the sliding window; what stands behind the branching point in the trunk is
    not seen."""
    model = Decoder(dataclasses.replace(model.config, window=window))
    rng = np.random.default_rng(0)
    trunk, ends = rng.integers(3, 300, 40), rng.integers(3, 300, (4, 6))
    start_B = np.array([3, 17, 39, 40], np.int32)
    _, cache = prefill(
        model,
        params,
        trunk[None].astype(np.int32),
        np.array([40]),
        None,
        np.int32(0),
        n_free=0,
        whole=True,
    )
    length_B = np.array([6, 2, 6, 1], np.int32)
    apply = jax.jit(model.apply)
    last_BxD, _ = prefill_branches(
        model,
        params,
        ends.astype(np.int32),
        length_B,
        cache,
        np.zeros(4, np.int32),
        start_B,
        n_free=4,
    )
    for row, (start, length) in enumerate(zip(start_B, length_B, strict=True)):
        whole = np.zeros((1, 46), np.int32)  # one shape: what stands behind is not seen
        whole[0, : start + length] = np.concatenate([trunk[:start], ends[row, :length]])
        expected = apply(params, whole)[0, start + length - 1]
        np.testing.assert_allclose(model.logits(params, last_BxD[row]), expected, atol=1e-4)


def test_layers_of_several_shapes_branch_from_one_prefix(model, tokenizer):
    """A cache of each stack that has keys and values of its own."""
    shapes = {
        "n_layers": 4,
        "sliding": (True, False) * 2,
        "full_head_dim": 16,
        "full_kv_heads": 1,
        "n_sharing": 2,
        "sharing_mlp_size": 20,
    }
    model = Decoder(
        dataclasses.replace(
            model.config, **shapes, per_layer_size=4, per_layer_vocab=300, rope_theta_sliding=100.0
        )
    )
    params = jax.jit(model.init)(jax.random.key(0))
    generator = Generator(model, tokenizer)
    cached = generator.prefix(params, PREFIX)
    assert {name: block["k"].shape[::4] for name, block in cached.cache.items()} == {
        "from0by2": (1, 8),
        "from1by2": (1, 16),
    }
    groups = GROUPS[:2]
    branched = generator.generate_branches(params, groups, GREEDY, cached)
    alone = [generator.generate(params, prompts, GREEDY, cached) for prompts in groups]
    assert [[reply.tokens for reply in replies] for replies in branched] == [
        [reply.tokens for reply in replies] for replies in alone
    ]
    assert len({reply.tokens for replies in alone for reply in replies}) > 2


def test_shared_tokens_leave_one_to_run():
    assert [n_shared(t, [1, 2, 3, 4]) for t in ([1, 2, 3, 4], [1, 2], [1, 2, 9], [9], [1])] == [
        3,
        1,
        2,
        0,
        0,
    ]
