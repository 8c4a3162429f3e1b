"""Configurations as others write them: read, or refused in a line that names the key; never another
exception, never a hang."""

from __future__ import annotations

import json

import hypothesis
import hypothesis.strategies as st
import pytest

from kafjax.core.errors import UserError
from kafjax.models import DecoderConfig, EncoderConfig
from kafjax.models.shapes import named

PLAIN = {
    **{
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    },
    **{
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "max_position_embeddings": 128,
    },
    **{
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attention_bias": False,
        "sliding_window": None,
    },
}
LONG = {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]}
FILES = {
    "llama": {**PLAIN, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "mistral": {**PLAIN, "sliding_window": 16},
    "ministral3": {
        **PLAIN,
        "rope_parameters": {
            "type": "yarn",
            "factor": 2.0,
            "llama_4_scaling_beta": 0.1,
            "mscale_all_dim": 0.0,
        },
    },
    "phi3": {
        **PLAIN,
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 64,
        "rope_scaling": LONG,
    },
    "qwen2": {**PLAIN, "use_sliding_window": False, "max_window_layers": 2},
    "qwen3": {**PLAIN, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "qwen3_moe": {
        **PLAIN,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
    },
    "mixtral": {**PLAIN, "num_local_experts": 8, "num_experts_per_tok": 2},
    "smollm3": {
        **PLAIN,
        "no_rope_layers": [1, 1, 1, 0],
        "no_rope_layer_interval": 4,
        "use_sliding_window": False,
    },
    "olmo2": {
        **PLAIN,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 2.0,
            "attention_factor": 1.0,
            "beta_fast": 32.0,
            "mscale": 1.0,
        },
    },
    "olmo3": {
        **PLAIN,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma4_text": {
        **{
            **PLAIN,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "global_head_dim": 16,
        },
        **{
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 4,
            "vocab_size_per_layer_input": 99,
            "use_double_wide_mlp": True,
        },
        **{
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "final_logit_softcapping": 30.0,
            "enable_moe_block": False,
        },
        **{
            "use_bidirectional_attention": None,
            "per_layer_config": {"1": {"head_dim": 16}, "3": {"head_dim": 16}},
        },
    },
    "gemma3_text": {
        **PLAIN,
        "sliding_window": 16,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma2": {
        **PLAIN,
        "sliding_window": 16,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "bert": {**PLAIN, "layer_norm_eps": 1e-12, "type_vocab_size": 2, "hidden_act": "gelu"},
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**40), 10**40) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def read(family: str, config: dict):
    return (
        EncoderConfig.from_hf(config)
        if family == "bert"
        else DecoderConfig.from_hf({**config, "model_type": family})
    )


@pytest.mark.parametrize("family", FILES)
def test_any_change_of_a_published_file_is_read_or_refused(family, request):
    assert read(family, FILES[family])
    keys = sorted(
        {
            *FILES[family],
            "rope_scaling",
            "rope_parameters",
            "layer_types",
            "sliding_window_pattern",
            "use_sliding_window",
        }
    )

    @hypothesis.given(
        st.dictionaries(st.sampled_from(keys), JSON, min_size=1, max_size=3),
        st.lists(st.sampled_from(keys), max_size=2),
    )
    @hypothesis.settings(
        max_examples=request.config.getoption("--fuzz"), derandomize=True, deadline=None
    )
    def check(changes, missing):
        config = {
            key: value for key, value in {**FILES[family], **changes}.items() if key not in missing
        }
        try:
            found = read(family, config)
        except UserError as error:
            assert len(str(error)) < 500
        else:
            assert (
                0 < found.hidden_size <= 2**20
                and 0 < found.n_layers <= 10_000
                and found.norm_eps > 0
            )

    check()


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("num_hidden_layers", 2**31, "must be a whole number from 1 to 10000"),
        ("hidden_size", 10**40, "hidden_size=a number of many digits must be a whole number"),
        ("rms_norm_eps", -1e-6, "must be a number above 0"),
        ("rms_norm_eps", "1e-6", "must be a number above 0"),
        ("rope_theta", None, "rope_theta=None must be a number above 0"),
        ("max_position_embeddings", None, "must be a whole number"),
        ("tie_word_embeddings", None, "must be true or false"),
        ("attention_bias", "false", "must be true or false"),
        ("sliding_window", 0, "must be a whole number from 1"),
        ("rope_scaling", [], "rope_scaling=\\[\\] must be an object"),
        (
            "rope_scaling",
            {"rope_type": "linear", "factor": -2},
            "rope_scaling: factor=-2 must be a number above 0",
        ),
        (
            "rope_scaling",
            {"rope_type": "yarn", "factor": 2, "mscale": -1},
            "rope_scaling: mscale=-1 must be a number from 0",
        ),
        ("layer_types", "full_attention", "must be a list of names"),
        ("bos_token_id", 1.5, "must be a token's number, or null"),
    ],
)
def test_a_value_that_cannot_be_computed_is_named(key, value, told):
    with pytest.raises(UserError, match=f"config.json.*{told}"):
        read("mistral", {**FILES["mistral"], key: value})


def test_null_means_the_default_where_published_files_write_it():
    usual = read("mistral", FILES["mistral"])
    same = {
        **FILES["mistral"],
        "head_dim": None,
        "rope_scaling": None,
        "rope_parameters": {"rope_theta": 1e4},
        "rope_theta": None,
    }
    assert read("mistral", same) == usual
    assert json.dumps(named("llama3.1-8b").to_hf())
