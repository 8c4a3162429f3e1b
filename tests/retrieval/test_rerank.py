"""The reranker: scores of the live CrossEncoder of sentence-transformers, an order by them,
refusals by name."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import transformers
from oracles import TINY_BERT, randomised
from tokenizers import processors

from kafjax import hub
from kafjax.core.errors import UserError
from kafjax.core.records import Passage
from kafjax.retrieval import Lexical, Reranked, Store, open_scorer
from tests import tiny

PAIRS = [
    ("Who makes maps?", "Lotte Pryce makes maps and sells them on the market."),
    ("Where was Mira Toll born?", "Mira Toll was born in Veltmora."),
    ("a", ""),
    ("maps " * 30, "bells " * 5),
    ("bread", "clocks and boats " * 20),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random BERT classifier with the wordpiece tokenizer of the tiny corpus."""
    folder = tmp_path_factory.mktemp("reranker") / "model"
    tokenizer = hub.tokenizer(str(tiny.write_bert(folder.parent / "bert")))
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends
    )
    config = transformers.BertConfig(
        **{**TINY_BERT, "vocab_size": tokenizer.get_vocab_size()}, num_labels=1
    )
    randomised(transformers.BertForSequenceClassification(config), 0).save_pretrained(folder)
    specials = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
    }
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=32,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **specials,
    )
    fast.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("activation", ["Sigmoid", "Identity"])
def test_scores_are_those_of_sentence_transformers(folder, tmp_path, activation):
    import torch
    from sentence_transformers import CrossEncoder

    live = CrossEncoder(str(folder), device="cpu", activation_fn=getattr(torch.nn, activation)())
    expected = live.predict(PAIRS)
    # as published by sentence-transformers, and as transformers alone writes it
    for source in (tmp_path / "saved", folder):
        if source != folder:
            live.save(str(source))
        elif activation == "Identity":
            continue
        np.testing.assert_allclose(open_scorer(str(source)).score(PAIRS), expected, atol=1e-5)
    assert np.ptp(expected) > 0.01


def test_candidates_are_ordered_by_the_scores(folder):
    store = Store(None, [Passage(row["id"], row["contents"]) for row in tiny.documents()])
    scorer = open_scorer(str(folder))
    question = "Who makes maps and sells them on the market?"
    (found,) = Lexical(store).search([question], 4)
    scores = scorer.score([(question, hit.passage.text) for hit in found])
    order = np.argsort(-scores, kind="stable")
    (reranked,) = Reranked(Lexical(store), scorer, candidates=4).search([question], 3)
    assert [hit.passage for hit in reranked] == [found[i].passage for i in order[:3]]
    np.testing.assert_allclose([hit.score for hit in reranked], scores[order[:3]], atol=1e-6)
    assert Reranked(Lexical(store), scorer).search([question, "unheard"], 2)[1] == []


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"architectures": ["BertModel"]}, "is no reranker"),
        (
            "config.json",
            {"id2label": {"0": "no", "1": "yes"}},
            "a reranker has one label, this classifier has 2",
        ),
        ("config.json", {"hidden_act": "relu"}, "hidden_act"),
        (
            "config.json",
            {"sentence_transformers": {"activation_fn": "torch.nn.Softplus"}},
            "activation_fn 'softplus' is not computed",
        ),
        ("config.json", {"num_hidden_layers": 2}, "extra tensor"),
        (
            "config_sentence_transformers.json",
            {"prompts": {"query": "q: "}},
            "prompts of a cross-encoder",
        ),
    ],
)
def test_what_is_no_reranker_is_refused_in_one_line(folder, tmp_path, file, changes, message):
    other = shutil.copytree(folder, tmp_path / "other")
    path = other / file
    path.write_text(
        json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes})
    )
    with pytest.raises(UserError, match=message) as error:
        open_scorer(str(other))
    assert "\n" not in str(error.value)


def test_an_encoder_is_no_reranker_and_a_reranker_no_encoder(folder):
    with pytest.raises(UserError, match="is no reranker"):
        open_scorer(str(folder.parent / "bert"))
    with pytest.raises(UserError, match="extra tensor 'classifier"):
        hub.load(str(folder))
