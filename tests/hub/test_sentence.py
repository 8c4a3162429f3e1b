"""Files beside an encoder's config.json: the vectors of the real sentence-transformers, or a
refusal by name."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from kafjax import hub
from kafjax.core.errors import UserError
from kafjax.retrieval import Embedder
from tests import tiny

TEXTS = [
    "Mira Toll was born in Veltmora.",
    "Who makes maps?",
    "a b",
    "",
    "She makes Glass, and sells IT in the town by the sea.",
]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny.write_bert(tmp_path_factory.mktemp("bert") / "plain")


@pytest.fixture(scope="module")
def written(bert, tmp_path_factory):
    """`written(modules, **about)`: (folder, the live SentenceTransformer) of the tiny encoder and
    what stands behind it."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Transformer

    def write(*behind, lower=False, longest=None, **about):
        torch.manual_seed(0)
        first = Transformer(str(bert), do_lower_case=lower) if lower else Transformer(str(bert))
        first.auto_model.eval()
        if longest:
            first.max_seq_length = longest
        st = SentenceTransformer(modules=[first, *behind], device="cpu", **about)
        folder = tmp_path_factory.mktemp("st") / "model"
        st.save(str(folder))
        return folder, st

    return write


def embedder(folder) -> Embedder:
    model, params = hub.load(str(folder))
    return Embedder(model, params, hub.tokenizer(str(folder)))


def modules():
    from sentence_transformers import models

    return models


MODES = [
    "cls",
    "max",
    "mean",
    "mean_sqrt_len_tokens",
    "weightedmean",
    "lasttoken",
    ("cls", "mean"),
    ("max", "lasttoken", "weightedmean"),
]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_each_pooling_gives_the_vectors_of_sentence_transformers(written, mode):
    folder, st = written(modules().Pooling(32, pooling_mode=mode), modules().Normalize())
    found = embedder(folder)
    assert found.dimension == st.encode(TEXTS).shape[1]
    np.testing.assert_allclose(found.embed(TEXTS), st.encode(TEXTS), atol=1e-5)


@pytest.mark.parametrize("activation", ["Tanh", "Identity", "ReLU", "GELU"])
@pytest.mark.parametrize("bias", [True, False])
def test_dense_layers_are_computed(written, activation, bias):
    import torch

    layer = modules().Dense(32, 24, bias=bias, activation_function=getattr(torch.nn, activation)())
    folder, st = written(
        modules().Pooling(32, pooling_mode="mean"),
        layer,
        modules().Dense(24, 8),
        modules().Normalize(),
    )
    np.testing.assert_allclose(embedder(folder).embed(TEXTS), st.encode(TEXTS), atol=1e-5)


@pytest.mark.parametrize(("similarity", "unit"), [("dot", False), ("cosine", True)])
def test_vectors_that_are_compared_by_products_keep_their_length_and_others_are_of_length_1(
    written, similarity, unit
):
    folder, st = written(modules().Pooling(32, pooling_mode="mean"), similarity_fn_name=similarity)
    expected = st.encode(TEXTS, normalize_embeddings=unit)
    assert np.allclose(np.linalg.norm(expected, axis=1), 1) is unit
    np.testing.assert_allclose(embedder(folder).embed(TEXTS), expected, atol=1e-5)


def test_queries_and_documents_go_behind_their_prompts_and_that_is_told(written, capsys):
    prompts = {"query": "query: ", "document": "passage: "}
    folder, st = written(
        modules().Pooling(32, pooling_mode="mean"), modules().Normalize(), prompts=prompts
    )
    found = embedder(folder)
    np.testing.assert_allclose(found.embed_queries(TEXTS), st.encode_query(TEXTS), atol=1e-5)
    np.testing.assert_allclose(found.embed_documents(TEXTS), st.encode_document(TEXTS), atol=1e-5)
    assert np.abs(found.embed(TEXTS) - found.embed_queries(TEXTS)).max() > 0.01
    assert (
        "queries behind the prompt 'query: ', passages behind 'passage: '"
        in capsys.readouterr().err
    )


def test_the_longest_text_is_the_folders_and_what_is_not_read_is_told(written, capsys):
    folder, st = written(
        modules().Pooling(32, pooling_mode="mean"), modules().Normalize(), longest=8
    )
    found = embedder(folder)
    assert found.max_length == 8
    np.testing.assert_allclose(found.embed_documents(TEXTS), st.encode(TEXTS), atol=1e-5)
    n_long = sum(n > 8 for n in found.lengths(TEXTS))
    assert 0 < n_long < len(TEXTS) and max(found.lengths(TEXTS)) > 8
    assert (
        f"{n_long} of {len(TEXTS)} passages are longer than 8 tokens and are not read to their end"
        in capsys.readouterr().err
    )


def test_keys_of_years_ago_are_read(written):
    folder, st = written(modules().Pooling(32, pooling_mode=("cls", "mean")), modules().Normalize())
    old = {
        "pooling_mode_cls_token": True,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_max_tokens": False,
    }
    old |= {"word_embedding_dimension": 32}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(old))
    np.testing.assert_allclose(embedder(folder).embed(TEXTS), st.encode(TEXTS), atol=1e-5)


def test_another_pooling_or_prompt_is_another_index(written):
    def fingerprint(mode, **about):
        return embedder(
            written(modules().Pooling(32, pooling_mode=mode), modules().Normalize(), **about)[0]
        ).fingerprint

    usual = fingerprint("mean")
    assert usual == fingerprint("mean", prompts={"classification": "sort: "})  # which is not used
    assert len({usual, fingerprint("cls"), fingerprint("mean", prompts={"query": "query: "})}) == 3


def change(folder, tmp_path, file, **changes):
    copy = shutil.copytree(folder, tmp_path / "copy")
    path = copy / file
    stored = json.loads(path.read_text())
    path.write_text(
        json.dumps(stored | changes if isinstance(stored, dict) else [*stored, changes])
    )
    return copy


@pytest.mark.parametrize(
    ("file", "changes", "told"),
    [
        ("modules.json", {"type": "x.LSTM", "path": ""}, r"module 4, LSTM, is not computed here"),
        ("modules.json", {"type": "x.Dense", "path": "../.."}, "leads out of the folder"),
        (
            "1_Pooling/config.json",
            {"pooling_mode": "median"},
            r"pooling mode 'median' is not computed. Did you mean 'mean'\?",
        ),
        ("1_Pooling/config.json", {"pooling_mode": []}, "no pooling mode is on"),
        (
            "2_Dense/config.json",
            {"activation_function": "torch.nn.Softmax"},
            "activation_function 'softmax' is not computed",
        ),
        (
            "2_Dense/config.json",
            {"in_features": 31},
            "in_features=31, out_features=16; 32 features come in",
        ),
        ("2_Dense/config.json", {"use_residual": True}, "use_residual=True is not computed"),
        (
            "config_sentence_transformers.json",
            {"similarity_fn_name": "manhattan"},
            "similarity_fn_name='manhattan' is not computed",
        ),
        ("config_sentence_transformers.json", {"prompts": [1]}, "prompts must be texts by name"),
        (
            "sentence_bert_config.json",
            {"max_seq_length": "long"},
            "max_seq_length='long' must be a whole number",
        ),
    ],
)
def test_what_is_not_computed_is_refused_by_name(written, tmp_path, file, changes, told):
    folder, _ = written(
        modules().Pooling(32, pooling_mode="mean"), modules().Dense(32, 16), modules().Normalize()
    )
    with pytest.raises(UserError, match=told):
        embedder(change(folder, tmp_path, file, **changes))


def test_missing_weights_of_a_dense_layer_are_named(written, tmp_path):
    folder, _ = written(
        modules().Pooling(32, pooling_mode="mean"), modules().Dense(32, 16), modules().Normalize()
    )
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"2_Dense/model\.safetensors: missing or damaged"):
        hub.load(str(copy))
