"""The encoder against transformers' BERT and sentence-transformers' pooling on tiny random
checkpoints."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from oracles import carry_over, quick_jit, random_tokens, tiny_hf_bert
from sentence_transformers.models import Normalize, Pooling

from kafjax.core import trees
from kafjax.core.errors import UserError

LENGTHS = np.array([11, 4, 1])
MASK = np.arange(11) < LENGTHS[:, None]
TOKENS = random_tokens(0, (3, 11), 67)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    hf = tiny_hf_bert()
    return hf, *carry_over(hf, tmp_path_factory.mktemp("bert"))


def reference(hf):
    """(states after each layer, pooled and normalised vectors) in torch."""
    mask = torch.tensor(MASK).long()
    with torch.no_grad():
        states = hf(
            torch.tensor(np.asarray(TOKENS)).long(), attention_mask=mask, output_hidden_states=True
        ).hidden_states
        features = {"token_embeddings": states[-1], "attention_mask": mask}
        pooled = Normalize()(Pooling(hf.config.hidden_size, pooling_mode="mean")(features))[
            "sentence_embedding"
        ]
    return [s.numpy() for s in states[1:]], pooled.numpy()


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_attention_heads": 12, "layer_norm_eps": 0.1},
        {"num_attention_heads": 1, "type_vocab_size": 1},
    ],
    ids=str,
)
def test_token_states_and_vectors_equal_the_reference(overrides, tmp_path):
    hf = tiny_hf_bert(**overrides)
    model, params = carry_over(hf, tmp_path)
    layers, vectors = reference(hf)
    np.testing.assert_allclose(
        quick_jit(model.hidden)(params, TOKENS, MASK)[MASK], layers[-1][MASK], atol=2e-5
    )
    embedded = quick_jit(model.apply)(params, TOKENS, MASK)
    np.testing.assert_allclose(embedded, vectors, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=-1), 1, atol=1e-6)


def test_each_layer_equals_transformers(tiny):
    hf, model, params = tiny
    for n_layers, expected in enumerate(reference(hf)[0], 1):
        cut = dataclasses.replace(
            model, config=dataclasses.replace(model.config, n_layers=n_layers), unroll=False
        )
        first_layers = {
            **params,
            "layers": jax.tree.map(lambda x, n=n_layers: x[:n], params["layers"]),
        }
        np.testing.assert_allclose(
            quick_jit(cut.hidden)(first_layers, TOKENS, MASK)[MASK], expected[MASK], atol=2e-5
        )


def test_a_checkpoint_with_a_head_and_prefixed_names_is_the_same_encoder(tiny, tmp_path):
    """`BertForMaskedLM` writes "bert." before each name and has a head besides."""
    hf = tiny_hf_bert(family=transformers.BertForMaskedLM)
    model, params = carry_over(hf, tmp_path)
    np.testing.assert_allclose(
        quick_jit(model.apply)(params, TOKENS, MASK), reference(hf.bert)[1], atol=2e-6
    )


def test_padding_changes_nothing(tiny):
    _, model, params = tiny
    apply = quick_jit(model.apply)
    together = apply(params, TOKENS, MASK)
    other_padding = apply(params, np.where(MASK, TOKENS, 5), MASK)
    np.testing.assert_allclose(other_padding, together, atol=1e-6)
    longer = apply(params, jnp.pad(TOKENS, ((0, 0), (0, 5))), np.pad(MASK, ((0, 0), (0, 5))))
    np.testing.assert_allclose(longer, together, atol=1e-6)


def test_a_row_of_padding_only_gives_no_nan(tiny):
    _, model, params = tiny
    assert jnp.isfinite(quick_jit(model.apply)(params, TOKENS, np.zeros_like(MASK))).all()


def test_scan_equals_unrolled(tiny):
    _, model, params = tiny
    scanned = quick_jit(dataclasses.replace(model, unroll=not model.unroll).apply)(
        params, TOKENS, MASK
    )
    np.testing.assert_allclose(scanned, quick_jit(model.apply)(params, TOKENS, MASK), atol=1e-6)


def test_more_tokens_than_positions_are_refused(tiny):
    _, model, params = tiny
    with pytest.raises(UserError, match=r"33 tokens.* 32"):
        model.hidden(params, jnp.zeros((1, 33), jnp.int32), jnp.ones((1, 33), bool))


def test_init_is_what_abstract_params_and_axes_say(tiny):
    _, model, _ = tiny
    params = quick_jit(model.init)(jax.random.key(0))

    def describe(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    assert describe(params) == describe(model.abstract_params())
    axes = trees.flatten(model.axes())
    assert {path: len(names) for path, names in axes.items()} == {
        p: x.ndim for p, x in trees.flatten(params).items()
    }
