"""The `config.json` of each family, from the fields of a `DecoderConfig`: the way back of
`families`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kafjax.models import gemma4
from kafjax.models.ropes import written_rope

_ARCHITECTURES = {
    "gemma4_text": "Gemma4ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}


def write(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of a Hugging Face folder; `fields` are those of a `DecoderConfig`, nested
    ones as dicts."""
    family = fields["family"]
    config: dict[str, Any] = {
        "model_type": family,
        "architectures": [_ARCHITECTURES[family]],
        "vocab_size": fields["vocab_size"],
        "hidden_size": fields["hidden_size"],
        "intermediate_size": fields["mlp_size"],
        "num_hidden_layers": fields["n_layers"],
        "num_attention_heads": fields["n_heads"],
        "num_key_value_heads": fields["n_kv_heads"],
        "head_dim": fields["head_dim"],
        "rms_norm_eps": fields["norm_eps"],
        "max_position_embeddings": fields["max_length"],
        "bos_token_id": fields["bos_id"],
        "eos_token_id": [fields["eos_id"], *fields["also_eos_ids"]]
        if fields["also_eos_ids"]
        else fields["eos_id"],
        "tie_word_embeddings": fields["tied"],
        "rope_theta": fields["rope_theta"],
        "rope_scaling": written_rope(fields),
        "sliding_window": fields["window"],
    }
    kinds = ["sliding_attention" if sliding else "full_attention" for sliding in fields["sliding"]]
    if family == "gemma4_text":
        full_rope = {
            "rope_type": "default",
            "rope_theta": config.pop("rope_theta"),
            **(config.pop("rope_scaling") or {}),
        }
        return (
            config
            | gemma4.write(fields, full_rope)
            | {"layer_types": kinds, "attention_bias": fields["o_bias"]}
        )
    if family in ("gemma3_text", "gemma2"):
        config |= {"layer_types": kinds, "attention_bias": fields["o_bias"]}
        config |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": round(fields["attention_scale"] ** -2),
        }
        if family == "gemma2":
            return config | {
                "attn_logit_softcapping": fields["attention_cap"],
                "final_logit_softcapping": fields["logit_cap"],
            }
        return config | {"rope_local_base_freq": fields["rope_theta_sliding"]}
    # some families' default is a token that a smaller vocabulary lacks
    config |= {"hidden_act": "silu", "pad_token_id": None}
    if family in ("llama", "qwen3", "olmo2", "olmo3", "smollm3", "qwen3_moe"):
        config["attention_bias"] = fields["o_bias"]
    if family in ("mixtral", "qwen3_moe"):
        config |= {"num_experts_per_tok": fields["experts_per_token"]}
    if family == "mixtral":
        config["num_local_experts"] = fields["n_experts"]
    if family == "qwen3_moe":
        config |= {
            "num_experts": fields["n_experts"],
            "norm_topk_prob": fields["normalised_shares"],
        }
        config |= {
            "moe_intermediate_size": fields["mlp_size"],
            "use_sliding_window": fields["window"] is not None,
        }
    if family == "phi3":
        config["partial_rotary_factor"] = (fields["rotary_dim"] or fields["head_dim"]) / fields[
            "head_dim"
        ]
        if (stretch := fields["rope_stretch"]) is not None:
            config |= {
                "max_position_embeddings": stretch.longest,
                "original_max_position_embeddings": stretch.original_length,
            }
    # transformers needs the two numbers of the growth, whether there is one or not
    if family == "ministral3":
        rope = {
            "rope_type": "default",
            "original_max_position_embeddings": fields["max_length"],
            **(config.pop("rope_scaling") or {}),
        }
        growth = fields["query_growth"]
        if growth is not None:
            rope["original_max_position_embeddings"] = growth.length
        rope["llama_4_scaling_beta"] = 0.0 if growth is None else growth.beta
        config["rope_parameters"] = {**rope, "rope_theta": config.pop("rope_theta")}
    if family == "olmo3":  # its ropes have to be told by kind of layer
        full = {
            "rope_type": "default",
            "rope_theta": config.pop("rope_theta"),
            **(config.pop("rope_scaling") or {}),
        }
        sliding = {"rope_type": "default", "rope_theta": fields["rope_theta_sliding"]}
        config |= {
            "layer_types": kinds,
            "rope_parameters": {"full_attention": full, "sliding_attention": sliding},
        }
    if family == "smollm3":
        config["no_rope_layers"] = [int(rotated) for rotated in fields["rotated"]]
    if family in ("qwen2", "qwen3", "smollm3"):
        config |= {"layer_types": kinds, "use_sliding_window": fields["window"] is not None}
    return config
