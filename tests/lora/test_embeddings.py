"""Adapters beside the embedding and the head, and rows of tokens that are trained: by what they
merge to, and by the real `peft`."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from oracles import carry_over, hf_logits, quick_jit, random_tokens, tiny_hf

from kafjax import lora
from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.models import Decoder
from kafjax.ops.linear import LoRAWeight
from kafjax.ops.loss import chunked_cross_entropy
from tests.shapes import TINY

CONFIG = dataclasses.replace(TINY, sliding=(False, False), window=None)
TIED = Decoder(CONFIG)
UNTIED = Decoder(dataclasses.replace(CONFIG, tied=False))
TOKENS = random_tokens(0, (2, 12), 61)
EMBED = "embed/embedding"
ROWS = tuple(int(id) for id in np.unique(TOKENS[:, 1:-1])[:3])
CASES = {
    "tied, embedding and a kernel": (TIED, lora.Spec(rank=3, alpha=6.0, targets="embed/|q_proj")),
    "tied, rows": (TIED, lora.Spec(rank=3, alpha=6.0, targets="q_proj", token_rows=ROWS)),
    "untied, both and a kernel": (UNTIED, lora.Spec(rank=3, alpha=6.0, targets="embedding|q_proj")),
    "untied, both with dora": (
        UNTIED,
        lora.Spec(rank=3, alpha=6.0, targets="embedding", dora=True),
    ),
    "untied, rows": (UNTIED, lora.Spec(rank=3, alpha=6.0, targets="q_proj", token_rows=ROWS)),
}


@pytest.fixture(scope="module")
def bases():
    return {model: quick_jit(model.init)(jax.random.key(0)) for model in (TIED, UNTIED)}


def noisy(adapters):
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: x + jnp.array(0.2 * rng.standard_normal(x.shape, np.float32)), adapters
    )


def loss_and_logits(model, params):
    hidden, _ = model.hidden(params, TOKENS)
    weights = (jnp.arange(TOKENS[:, 1:].size) % 3 != 0).astype(jnp.float32)
    loss = chunked_cross_entropy(
        hidden[:, :-1].reshape(-1, 16),
        model.unembedding(params),
        TOKENS[:, 1:].reshape(-1),
        weights,
        chunk=5,
    )
    return loss, model.logits(params, hidden)


@pytest.mark.parametrize("name", CASES)
def test_attached_equals_merged_in_logits_loss_and_gradient(bases, name):
    """The gradient is that through the merged tables: of a tied embedding, of both its uses."""
    model, spec = CASES[name]
    params = bases[model]
    fresh = lora.init(spec, params, jax.random.key(1))
    adapters = noisy(fresh)
    attached, merged = (
        quick_jit(
            jax.value_and_grad(
                lambda a, way=way: loss_and_logits(model, way(params, a, spec)), has_aux=True
            )
        )
        for way in (lora.attach, lora.merge)
    )
    ((loss, logits), gradient), ((expected_loss, expected_logits), expected) = (
        attached(adapters),
        merged(adapters),
    )
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    np.testing.assert_allclose(logits, expected_logits, atol=3e-5)
    if not spec.dora:  # where the norm counts as a constant, and `merge` knows nothing of that
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), gradient, expected
        )
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient))
    (_, of_fresh), _ = attached(fresh)
    np.testing.assert_allclose(of_fresh, loss_and_logits(model, params)[1], atol=1e-5)


def test_a_tied_embedding_is_adapted_in_both_places(bases):
    for model, both in ((TIED, True), (UNTIED, False)):
        params = bases[model]
        spec = lora.Spec(rank=3, targets="embed/")
        attached = lora.attach(params, lora.init(spec, params, jax.random.key(0)), spec)
        assert isinstance(attached["embed"]["embedding"], LoRAWeight)
        assert isinstance(model.unembedding(attached), LoRAWeight) == both


def test_a_fresh_adapter_of_a_table_is_drawn_as_pefts():
    params = {
        "embed": {"embedding": jax.ShapeDtypeStruct((500, 300), jnp.float32)},
        "head": {"embedding": jax.ShapeDtypeStruct((500, 300), jnp.float32)},
    }
    drawn = lora.init(lora.Spec(rank=40, targets="embedding"), params, jax.random.key(0))
    embed, head = drawn[EMBED], drawn["head/embedding"]
    assert {leaf.shape for pair in drawn.values() for leaf in pair.values()} == {
        (500, 40),
        (40, 300),
    }
    assert not embed["a"].any() and not head["a"].any()
    np.testing.assert_allclose(embed["b"].std(), 1, rtol=0.02)
    assert 0.99 * 300**-0.5 < float(jnp.abs(head["b"]).max()) <= 300**-0.5


@pytest.mark.parametrize("model", [TIED, UNTIED])
def test_rows_leave_all_others_alone(bases, model):
    params, spec = bases[model], lora.Spec(rank=3, targets="q_proj", token_rows=(5, 60, 0))
    adapters = noisy(lora.init(spec, params, jax.random.key(0)))
    merged = lora.merge(params, adapters, spec)["embed"]["embedding"]
    before = params["embed"]["embedding"]
    np.testing.assert_allclose(
        merged[np.array(spec.token_rows)], adapters[EMBED]["rows"], atol=1e-7
    )
    others = np.setdiff1d(np.arange(61), spec.token_rows)
    np.testing.assert_array_equal(merged[others], before[others])
    assert lora.count(spec, params) == 3 * 16 + lora.count(
        lora.Spec(rank=3, targets="q_proj"), params
    )
    assert lora.axes(lora.abstract(spec, params), model.axes())[EMBED] == {"rows": (None, "embed")}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"token_rows": (61,)}, "there is no row 61, 'embed/embedding' has rows 0 to 60"),
        ({"token_rows": (1, 1)}, "each once"),
        ({"token_rows": (-1,)}, "token_rows=-1: must be 0 or more"),
        ({"token_rows": (1,), "targets": "embed|q_proj"}, "trained as a whole"),
        ({"token_rows": (1,), "trained": "embed"}, "trained as a whole"),
        ({"targets": "embed", "layers": (0,)}, "are no layers"),
        ({"targets": "embed", "rank": 17}, r"rank=17 is above min\(in, out\) of 'embed/embedding'"),
    ],
)
def test_what_does_not_go_is_told(changes, told):
    with pytest.raises(UserError, match=told):
        lora.abstract(
            lora.Spec(**{"rank": 2, "targets": "q_proj", **changes}), TIED.abstract_params()
        )


def test_lanes_refuse_both():
    for spec, told in (
        (lora.Spec(targets="embed|q_proj"), "adapt 'embed/embedding'"),
        (lora.Spec(token_rows=(1,)), "token_rows"),
    ):
        with pytest.raises(UserError, match=told):
            lora.lanes.padded_shapes([spec], TIED.abstract_params())


PEFT = {
    "embedding and head": (
        lora.Spec(rank=3, alpha=6.0, targets="embedding|q_proj"),
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    ),
    "rows": (
        lora.Spec(rank=3, alpha=6.0, targets="q_proj", token_rows=(7, 100)),
        {"target_modules": ["q_proj"], "trainable_token_indices": [7, 100]},
    ),
}


@pytest.mark.parametrize("name", PEFT)
def test_equals_peft_beside_a_head_of_its_own(name, tmp_path):
    spec, settings = PEFT[name]
    hf = tiny_hf("llama", num_hidden_layers=2, tie_word_embeddings=False)
    model, params = carry_over(hf, tmp_path)
    theirs = peft.get_peft_model(
        hf, peft.LoraConfig(r=3, lora_alpha=6, lora_dropout=0.0, **settings)
    ).eval()
    adapters = noisy(lora.init(spec, params, jax.random.key(0)))

    def put(parameter, value):
        return parameter.copy_(torch.tensor(np.asarray(value)))

    seen = set()
    with torch.no_grad():
        for where, module in theirs.named_modules():
            if where.endswith("embed_tokens") and hasattr(module, "lora_embedding_A"):
                put(module.lora_embedding_A["default"], adapters[EMBED]["a"].T)
                put(module.lora_embedding_B["default"], adapters[EMBED]["b"].T)
                seen.add(EMBED)
            elif where.endswith("lm_head") and hasattr(module, "lora_A"):
                put(module.lora_A["default"].weight, adapters["head/embedding"]["b"])
                put(module.lora_B["default"].weight, adapters["head/embedding"]["a"])
                seen.add("head/embedding")
            elif where.endswith("q_proj") and hasattr(module, "lora_A"):
                pair = adapters["layers/attn/q_proj/kernel"]
                layer = int(where.split("layers.")[1].split(".")[0])
                put(module.lora_A["default"].weight, pair["a"][layer].T)
                put(module.lora_B["default"].weight, pair["b"][layer].T)
                seen.add("layers/attn/q_proj/kernel")
            elif hasattr(module, "trainable_tokens_delta"):
                put(module.trainable_tokens_delta["default"], adapters[EMBED]["rows"])
                seen.add(EMBED)
    assert seen == set(adapters)
    tokens = jnp.concatenate(
        [random_tokens(0, (2, 12), 101), jnp.array([[7, 100], [100, 7]], jnp.int32)], axis=1
    )
    logits = quick_jit(model.apply)(lora.attach(params, adapters, spec), tokens)
    np.testing.assert_allclose(logits, hf_logits(theirs, tokens), rtol=2e-5, atol=3e-5)
    assert trees.count(theirs_trainable(theirs)) == lora.count(spec, params)


def theirs_trainable(model):
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
