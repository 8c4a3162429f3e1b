"""Configurations: what Hugging Face writes is read, in its old and new forms; what is not computed
is refused by name."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import transformers
from oracles import FAMILIES, GROWING, LONG, TINY_BERT, TINY_GEMMA, TINY_PLAIN

from kafjax.core.errors import UserError
from kafjax.models import CONFIGS, DecoderConfig, EncoderConfig
from kafjax.ops.rope import LongRope

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
        {"eos_token_id": [1, 96]},
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
    assert [not s for s in ours.sliding] == [
        kind == "full_attention" for kind in normalised["layer_types"]
    ]


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("gemma2", {"sliding_window": 3}),
        (
            "gemma2",
            {
                "attn_logit_softcapping": None,
                "final_logit_softcapping": 7.0,
                "query_pre_attn_scalar": 144,
                "rope_theta": 5e5,
            },
        ),
        ("llama", {}),
        (
            "llama",
            {
                "num_key_value_heads": None,
                "head_dim": None,
                "rope_theta": 5e5,
                "attention_bias": True,
                "tie_word_embeddings": True,
            },
        ),
        (
            "llama",
            {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}},
        ),
        ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("mistral", {}),
        ("mistral", {"sliding_window": None, "rope_theta": 1e6}),
        ("ministral3", {"rope_parameters": None}),
        (
            "ministral3",
            {
                "sliding_window": 3,
                "rope_parameters": {**GROWING, "mscale": 1.0, "mscale_all_dim": 0.0},
            },
        ),
        (
            "ministral3",
            {
                "rope_parameters": {
                    **GROWING,
                    "rope_type": "default",
                    "factor": 1.0,
                    "max_position_embeddings": 64,
                }
            },
        ),
        ("phi3", {"rope_theta": 2.5e5, "num_key_value_heads": None, "head_dim": None}),
        (
            "phi3",
            {
                "sliding_window": 3,
                "rope_scaling": {"type": "default", "partial_rotary_factor": 0.5},
            },
        ),
        (
            "phi3",
            {
                **LONG,
                "hidden_size": 32,
                "rope_scaling": LONG["rope_parameters"],
                "rope_parameters": None,
            },
        ),
        (
            "phi3",
            {
                **LONG,
                "hidden_size": 32,
                "rope_parameters": {**LONG["rope_parameters"], "attention_factor": 1.1},
            },
        ),
        ("qwen2", {"sliding_window": 131072, "use_sliding_window": False}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 3}),
        ("qwen3", {"head_dim": None, "eos_token_id": [5, 7]}),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "layer_types": ["full_attention", "sliding_attention"] * 2,
            },
        ),
        ("qwen3", {"rope_scaling": YARN, "rope_theta": 1e6}),
        (
            "qwen2",
            {
                "rope_parameters": {
                    **YARN,
                    "mscale": 1.0,
                    "mscale_all_dim": 0.5,
                    "rope_theta": 1e6,
                    "truncate": False,
                }
            },
        ),
        ("qwen3_moe", {"num_experts": None, "num_experts_per_tok": 8}),
        (
            "qwen3_moe",
            {
                "num_local_experts": 6,
                "num_experts_per_tok": 2,
                "num_experts": None,
                "use_sliding_window": True,
            },
        ),
        ("qwen3_moe", {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}),
        ("mixtral", {}),
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 4, "sliding_window": 3}),
        ("smollm3", {"no_rope_layer_interval": 2, "no_rope_layers": None}),
        (
            "smollm3",
            {
                "no_rope_layers": [1, 0, 1, 1, 0],
                "rope_theta": 5e6,
                "use_sliding_window": True,
                "sliding_window": 3,
            },
        ),
        ("olmo2", {"rope_theta": 5e5, "attention_bias": True}),
        ("olmo3", {"num_hidden_layers": 9}),
        (
            "olmo3",
            {
                "rope_scaling": {**YARN, "attention_factor": 1.2},
                "rope_theta": 77.0,
                "sliding_window": 3,
            },
        ),
    ],
    ids=str,
)
def test_the_other_families_mean_what_transformers_makes_of_them(family, overrides):
    """Both given in full, and as little as possible: what a file leaves out is transformers'
    default."""
    given = {
        key: value
        for key, value in {**TINY_PLAIN, **overrides}.items()
        if value is not None or key == "sliding_window"
    }
    minimal = without(
        given,
        "max_position_embeddings",
        *(("eos_token_id", "bos_token_id") if family in ("llama", "mistral") else ()),
    )
    for raw in (given, minimal):
        hf = FAMILIES[family][0](**copy.deepcopy(raw))  # which it changes
        ours = DecoderConfig.from_hf({**raw, "model_type": family})
        assert ours == DecoderConfig.from_hf({**hf.to_dict(), "head_dim": ours.head_dim})
        is_long = isinstance(ours.rope_stretch, LongRope)
        assert hf.max_position_embeddings == (
            ours.rope_stretch.longest if is_long else ours.max_length
        )
        assert (ours.n_kv_heads, ours.tied) == (hf.num_key_value_heads, hf.tie_word_embeddings)
        assert (
            ours.head_dim == getattr(hf, "head_dim", None)
            or hf.hidden_size // hf.num_attention_heads
        )
        rope = hf.rope_parameters.get("full_attention", hf.rope_parameters)
        assert (ours.rope_theta, ours.rope_factor) == (rope["rope_theta"], rope.get("factor", 1.0))
        assert (
            ours.rope_stretch is None
            or ours.rope_stretch.original_length == rope["original_max_position_embeddings"]
        )
        experts = (
            (hf.num_local_experts, hf.num_experts_per_tok)
            if family in ("qwen3_moe", "mixtral")
            else (0, 0)
        )
        assert (ours.n_experts, ours.experts_per_token) == experts
        assert ours.mlp_size == getattr(hf, "moe_intermediate_size", hf.intermediate_size)
        grown = (
            (rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"])
            if family == "ministral3"
            else None
        )
        assert grown == (ours.query_growth and dataclasses.astuple(ours.query_growth))
        assert ours.rotated == (
            tuple(entry == 1 for entry in hf.no_rope_layers[: ours.n_layers])
            if family == "smollm3"
            else None
        )
        if family == "gemma2":
            assert (ours.attention_cap, ours.logit_cap) == (
                hf.attn_logit_softcapping,
                hf.final_logit_softcapping,
            )
        if family in ("gemma2", "qwen2", "qwen3", "olmo3", "smollm3"):
            assert [kind == "sliding_attention" for kind in hf.layer_types] == list(ours.sliding)
            assert ours.window == hf.sliding_window


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"global_head_dim": 8, "use_double_wide_mlp": False, "rope_parameters": None},
        {
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
        },
        # not that many, then
        {
            "layer_types": None,
            "num_hidden_layers": 8,
            "num_kv_shared_layers": 1,
            "num_global_key_value_heads": 1,
        },
        # the last one is full
        {
            "layer_types": ["full_attention", "sliding_attention"] * 3,
            "use_bidirectional_attention": "vision",
        },
        {
            key: None
            for key in (
                "head_dim",
                "global_head_dim",
                "num_key_value_heads",
                "sliding_window",
                "hidden_size_per_layer_input",
            )
        }
        | {
            "vocab_size_per_layer_input": None,
            "final_logit_softcapping": 30.0,
            "num_kv_shared_layers": None,
        },
    ],
    ids=str,
)
def test_gemma4_is_what_transformers_makes_of_it(overrides):
    """Reads published files, and those that transformers writes, which tell the full layers' heads
    layer by layer."""
    given = {**FAMILIES["gemma4_text"][2], **overrides}
    raw = {key: value for key, value in given.items() if value is not None}
    ours, hf = (
        DecoderConfig.from_hf({**raw, "model_type": "gemma4_text"}),
        FAMILIES["gemma4_text"][0](**copy.deepcopy(raw)),
    )
    assert "per_layer_config" in hf.to_dict() and ours == DecoderConfig.from_hf(hf.to_dict())
    assert [kind == "sliding_attention" for kind in hf.layer_types] == list(
        ours.sliding
    ) and ours.window == hf.sliding_window
    for i, mode in enumerate(hf.kv_sharing_modes):
        shape, of_layer = ours.shape(i), hf.per_layer_config[i]
        assert (shape.head_dim, shape.n_kv_heads) == (
            of_layer.head_dim,
            of_layer.num_key_value_heads,
        )
        assert shape.shares_kv == (mode == "reuse")
    assert (ours.per_layer_size, ours.logit_cap) == (
        hf.hidden_size_per_layer_input,
        hf.final_logit_softcapping,
    )
    assert ours.rope_theta == hf.rope_parameters["full_attention"]["rope_theta"]
    assert ours.rope_theta_sliding == hf.rope_parameters["sliding_attention"]["rope_theta"]


def test_the_text_of_a_multimodal_gemma_with_the_defaults_that_its_file_leaves_out():
    """`text_config` of the published gemma-3-4b-it says no more than this."""
    scaling = {"factor": 8.0, "rope_type": "linear"}
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": scaling,
        "sliding_window": 1024,
    }
    raw = {
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text", **text},
        "eos_token_id": [1, 106],
    }
    assert DecoderConfig.from_hf(raw) == dataclasses.replace(CONFIGS["gemma3-4b"], multimodal=True)
    assert DecoderConfig.from_hf(raw) == DecoderConfig.from_hf(
        transformers.Gemma3Config(**without(raw, "model_type")).to_dict()
    )
    with pytest.raises(UserError, match="text_config"):
        DecoderConfig.from_hf({"model_type": "gemma3"})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_configuration_is_written_as_transformers_reads_it(family):
    ours = DecoderConfig.from_hf({**FAMILIES[family][2], "model_type": family})
    written = ours.to_hf()
    assert (
        DecoderConfig.from_hf(FAMILIES[family][0](**without(written, "model_type")).to_dict())
        == ours
    )
    assert written["architectures"] == [FAMILIES[family][1].__name__]
    with pytest.raises(UserError, match=f"activation='relu' is no {family}"):
        dataclasses.replace(ours, activation="relu").to_hf()


@pytest.mark.parametrize("changes", [{"sliding": (True,)}, {"window": None}, {"rotated": (True,)}])
def test_layers_that_do_not_fit_are_refused(changes):
    with pytest.raises(UserError, match=r"slid|rotated"):
        dataclasses.replace(CONFIGS["gemma3-270m"], **changes)


def test_the_oldest_form_names_its_rope_type_type():
    assert (
        DecoderConfig.from_hf(
            {**GEMMA, "rope_scaling": {"type": "linear", "factor": 8.0}}
        ).rope_factor
        == 8.0
    )


def test_numbers_that_a_file_leaves_out_are_transformers_defaults():
    minimal = without(
        GEMMA, "query_pre_attn_scalar", "max_position_embeddings", "layer_types", "pad_token_id"
    )
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
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "sliding_attention",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        (
            {"rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}}},
            "partial_rotary_factor=0.5",
        ),
        (
            {"rope_parameters": {"sliding_attention": {"partial_rotary_factor": 0.5}}},
            "partial_rotary_factor=0.5",
        ),
        ({"rope_parameters": {"full_attention": {"mrope_section": [1, 1, 2]}}}, "mrope_section"),
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
    ("family", "changes", "named"),
    [
        ("gemma4_text", {"enable_moe_block": True}, "enable_moe_block=True is not supported"),
        ("gemma4_text", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        (
            "gemma4_text",
            {"num_kv_shared_layers": 6},
            "num_kv_shared_layers=6 must be below num_hidden_layers=6",
        ),
        (
            "gemma4_text",
            {"num_kv_shared_layers": 5},
            "no layer before them is of type full_attention",
        ),
        (
            "gemma4_text",
            {"vocab_size_per_layer_input": 100},
            "vocab_size_per_layer_input=100 is below vocab_size=101",
        ),
        (
            "gemma4_text",
            {"attention_k_eq_v": True, "num_global_key_value_heads": 3},
            "no multiple of 3 key heads of full_attention",
        ),
        (
            "gemma4_text",
            {"per_layer_config": {"0": {"head_dim": 16}}},
            "layers of type full_attention alone",
        ),
        (
            "gemma4_text",
            {"per_layer_config": {i: {"sliding_window": 3} for i in "135"}},
            "'sliding_window' of per_layer_config",
        ),
        (
            "gemma4_text",
            {"per_layer_config": {i: {"num_key_value_heads": 1} for i in "135"}},
            "without attention_k_eq_v",
        ),
        (
            "gemma4_text",
            {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2.0}}},
            "yarn",
        ),
        (
            "gemma4_text",
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 1.5}
                }
            },
            "partial_rotary_factor=1.5 must be a number above 0, up to 1",
        ),
        (
            "gemma4_text",
            {"rope_parameters": {"sliding_attention": {"rope_type": "proportional"}}},
            "proportional",
        ),
        ("gemma4_text", {"hidden_activation": "silu"}, "hidden_activation"),
        ("gemma4", {}, "text_config"),
        (
            "gemma2",
            {"final_logit_softcapping": -1},
            "final_logit_softcapping=-1 must be a number above 0",
        ),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"hidden_activation": "silu"}, "hidden_activation"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"rope_scaling": {"rope_type": "yarn"}}, "factor"),
        ("llama", {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "longrope"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers lists 2 layers"),
        ("smollm3", {"no_rope_layers": [1, 0, 2, 1]}, "must be a list of 0 and 1"),
        ("smollm3", {"mlp_bias": True}, "mlp_bias"),
        (
            "olmo3",
            {"rope_parameters": {"sliding_attention": {"rope_type": "yarn", "factor": 2.0}}},
            "yarn",
        ),
        ("olmo3", {"layer_types": ["full_attention"] * 3}, "layer_types"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "dynamic"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        (
            "llama",
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "full_attention",
        ),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ("llama", {"sliding_window": 8}, "sliding_window"),
        ("llama", {"head_dim": None, "hidden_size": 26}, "head_dim"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("llama", {"num_local_experts": 8}, "num_local_experts"),
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("mistral", {"layer_types": ["full_attention"] * 4}, "layer_types"),
        ("mistral", {"attention_bias": True}, "attention_bias"),
        (
            "ministral3",
            {"rope_parameters": {"rope_type": "default", "llama_4_scaling_beta": 0.1}},
            "llama_4_scaling_beta needs",
        ),
        ("mistral", {"rope_parameters": GROWING}, "llama_4_scaling_beta"),
        ("mistral3", {}, "text_config"),
        (
            "phi3",
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 4}},
            "short_factor lists 4 numbers for 3",
        ),
        (
            "phi3",
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 3}},
            "needs a 'long_factor'",
        ),
        (
            "phi3",
            {"rope_parameters": {"rope_type": "longrope", "short_factor": ["1"] * 3}},
            "short_factor', a list of numbers",
        ),
        ("phi3", {"partial_rotary_factor": 0.4}, "turns 3 of 8 dimensions"),
        ("phi3", {"lm_head_bias": True}, "lm_head_bias"),
        ("mistral3", {"text_config": {"model_type": "mixtral"}}, "mixtral"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "no sliding_window"),
        ("llama", {"eos_token_id": [1, 101]}, "vocabulary of 101"),
        ("qwen3", {"eos_token_id": "</s>"}, "</s>"),
        ("qwen3", {"num_experts": 128}, "num_experts"),
        ("gemma3_text", {"rope_scaling": LLAMA3}, "llama3"),
        ("qwen4", {}, "Did you mean 'qwen3'"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ("qwen3_moe", {"num_experts_per_tok": 6}, "num_experts_per_tok=6 is above num_experts=5"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts=0"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise"),
        ("gemma2", {"num_experts": 4}, "num_experts"),
    ],
    ids=str,
)
def test_what_the_decoder_does_not_compute_of_other_families_is_refused_by_name(
    family, changes, named
):
    with pytest.raises(UserError, match=named):
        DecoderConfig.from_hf(
            {**FAMILIES.get(family, FAMILIES["llama"])[2], "model_type": family, **changes}
        )


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


@pytest.mark.parametrize(
    ("family", "given"), [("qwen2", None), ("llama", []), ("gemma3_text", None)]
)
def test_a_model_without_an_eos_is_read_and_asked_for_one_only_where_something_ends(family, given):
    config = DecoderConfig.from_hf(
        {**FAMILIES[family][2], "model_type": family, "eos_token_id": given}
    )
    assert config.eos_id is None and DecoderConfig.from_hf(config.to_hf()) == config
    with pytest.raises(UserError, match=r"no 'eos_token_id'.*generation_config\.json"):
        _ = config.text_end
    with pytest.raises(UserError, match="eos_token_id"):
        _ = config.end_ids
    assert config.ending_with(7).end_ids == (7,)


def test_another_token_ends_replies_once():
    config = dataclasses.replace(
        DecoderConfig.from_hf({**FAMILIES["llama"][2], "model_type": "llama"}),
        eos_id=5,
        also_eos_ids=(6,),
    )
    assert [config.ending_with(token).end_ids for token in (5, 6, 7)] == [(5, 6), (5, 6), (5, 6, 7)]
