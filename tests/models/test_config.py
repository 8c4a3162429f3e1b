"""Configurations: what Hugging Face writes is read, in its old and new forms; what is not computed is refused by name."""

from __future__ import annotations

import pytest
import transformers
from oracles import TINY_BERT, TINY_GEMMA

from kafjax.core.errors import UserError
from kafjax.models import DecoderConfig, EncoderConfig

GEMMA = {**TINY_GEMMA, "model_type": "gemma3_text"}
BERT = {**TINY_BERT, "model_type": "bert"}


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"rope_theta": 5e5, "rope_local_base_freq": 77.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 1e5},
        {"rope_scaling": None},
        {"layer_types": None, "num_hidden_layers": 13},
        {"layer_types": None, "sliding_window_pattern": 2},
        {"eos_token_id": [1, 106]},
    ],
    ids=str,
)
def test_old_and_new_forms_mean_what_transformers_makes_of_them(overrides):
    """The raw dict and what transformers normalises it to give one configuration."""
    raw = {**GEMMA, **overrides}
    normalised = transformers.Gemma3TextConfig(**without(raw, "model_type")).to_dict()
    ours = DecoderConfig.from_hf(raw)
    assert ours == DecoderConfig.from_hf(normalised)
    ropes = normalised["rope_parameters"]
    assert ours.rope_theta == ropes["full_attention"]["rope_theta"]
    assert ours.rope_theta_sliding == ropes["sliding_attention"]["rope_theta"]
    assert ours.rope_factor == ropes["full_attention"].get("factor", 1.0)
    assert [not s for s in ours.sliding] == [kind == "full_attention" for kind in normalised["layer_types"]]


def test_the_oldest_form_names_its_rope_type_type():
    assert DecoderConfig.from_hf({**GEMMA, "rope_scaling": {"type": "linear", "factor": 8.0}}).rope_factor == 8.0


def test_numbers_that_a_file_leaves_out_are_transformers_defaults():
    minimal = without(GEMMA, "query_pre_attn_scalar", "max_position_embeddings", "layer_types", "pad_token_id")
    normalised = transformers.Gemma3TextConfig(**without(minimal, "model_type")).to_dict()
    assert DecoderConfig.from_hf(minimal) == DecoderConfig.from_hf(normalised)
    minimal = without(BERT, "max_position_embeddings")
    normalised = transformers.BertConfig(**without(minimal, "model_type")).to_dict()
    assert EncoderConfig.from_hf(minimal) == EncoderConfig.from_hf(normalised)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"hidden_activation": "silu"}, "hidden_activation"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}}, "sliding_attention"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types"),
        ({"layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"hidden_size": None}, "hidden_size"),
        ({"head_dim": "8"}, "head_dim"),
    ],
    ids=str,
)
def test_what_the_decoder_does_not_compute_is_refused_by_name(changes, named):
    with pytest.raises(UserError, match=named):
        DecoderConfig.from_hf({**GEMMA, **changes})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"vocab_size": None}, "vocab_size"),
    ],
    ids=str,
)
def test_what_the_encoder_does_not_compute_is_refused_by_name(changes, named):
    with pytest.raises(UserError, match=named):
        EncoderConfig.from_hf({**BERT, **changes})
