"""The `config.json` of Llama and of what was made after it: plain norms and SiLU."""

from __future__ import annotations

from typing import Any

from kafjax.core.errors import UserError
from kafjax.models.family_fields import (
    DENSE,
    count,
    expert_fields,
    plain_fields,
    refuse,
    ropes_by_kind,
    window_fields,
)
from kafjax.models.ropes import Config, read_long_rope, read_rope, rope_type
from kafjax.ops.rope import QueryGrowth

_MINISTRAL3_ROPE = {  # of a file that has none
    **{
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
    },
    **{"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
}


def read_llama(config: Config) -> dict[str, Any]:
    """Reads a Llama, whose layers all see everything."""
    refuse(config, {"mlp_bias": False, "layer_types": None, "sliding_window": None})
    bias = bool(config.get("attention_bias"))
    return {**plain_fields(config, max_length=2048), "qkv_bias": bias, "o_bias": bias}


def read_mistral(config: Config) -> dict[str, Any]:
    """Reads a Mistral: a sliding window in every layer or in none."""
    refuse(config, {"attention_bias": False, "layer_types": None})
    window = config.get("sliding_window", 4096)
    n_layers = count(config, "num_hidden_layers")
    return {
        **plain_fields({"num_key_value_heads": 8, **config}, max_length=131072),
        **window_fields(config, window, [window is not None] * n_layers),
    }


def read_ministral3(config: Config) -> dict[str, Any]:
    """Reads a Ministral 3: YaRN, and queries that grow with their position."""
    rope: dict[str, Any] = dict(
        config.get("rope_scaling") or config.get("rope_parameters") or _MINISTRAL3_ROPE
    )
    # the latter says nothing new
    beta, _ = rope.pop("llama_4_scaling_beta", None), rope.pop("max_position_embeddings", None)
    defaults = {
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "max_position_embeddings": 262144,
    }
    config = {**defaults, **config}
    if rope_type(rope) == "yarn":
        rope.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    length: Any = rope.get("original_max_position_embeddings")
    if beta and length is None:
        raise UserError(
            "config.json: llama_4_scaling_beta needs 'original_max_position_embeddings'"
        )
    fields = read_mistral({**config, "rope_scaling": None, "rope_parameters": rope})
    return fields | {"query_growth": QueryGrowth(float(beta), length) if beta else None}


def read_phi3(config: Config) -> dict[str, Any]:
    """Reads a Phi 3 or 4: a part of each head that does not turn, and LongRoPE."""
    refuse(config, {"lm_head_bias": False, "mlp_bias": False})
    defaults = {
        "num_key_value_heads": None,
        "sliding_window": None,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 32000,
    }
    lengths = {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096}
    config = {**defaults, **lengths, **config}
    given: Any = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope = dict(given)
    share = rope.pop("partial_rotary_factor", config.pop("partial_rotary_factor", None)) or 1.0
    is_long = rope_type(rope) in ("longrope", "su", "yarn")  # one and the same in this family
    theta = rope.get("rope_theta", config.get("rope_theta", 1e4))
    plain_rope = {"rope_theta": theta} if is_long else rope
    fields = read_mistral({**config, "rope_scaling": None, "rope_parameters": plain_rope})
    rotary_dim = int(fields["head_dim"] * share)
    if rotary_dim % 2 or not 0 < rotary_dim <= fields["head_dim"]:
        size = fields["head_dim"]
        raise UserError(
            f"config.json: partial_rotary_factor={share!r} turns {rotary_dim} of {size} dimensions of a head"
        )
    fields["rotary_dim"] = None if rotary_dim == fields["head_dim"] else rotary_dim
    if is_long:
        stretch = read_long_rope(config, rope, rotary_dim)
        # A reply that grows beyond the original length would change what was cached.
        fields |= {
            "rope_stretch": stretch,
            "max_length": min(stretch.longest, stretch.original_length),
        }
    return fields


def read_qwen2(config: Config) -> dict[str, Any]:
    """Reads a Qwen 2 or 2.5: biases on q, k and v."""
    return {**_qwen(config), "qkv_bias": True}


def read_qwen3(config: Config) -> dict[str, Any]:
    """Reads a Qwen 3: q/k norms."""
    bias = bool(config.get("attention_bias"))
    return {**_qwen({"head_dim": 128, **config}), "qk_norm": True, "qkv_bias": bias, "o_bias": bias}


def _qwen(config: Config) -> dict[str, Any]:
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window", False) else None
    first = config.get("max_window_layers", 28)
    sliding = [window is not None and i >= first for i in range(count(config, "num_hidden_layers"))]
    defaults = {"num_key_value_heads": 32, "bos_token_id": None, "eos_token_id": None}
    return {
        **plain_fields({**defaults, **config}, max_length=32768),
        **window_fields(config, window, sliding),
    }


def read_qwen3_moe(config: Config) -> dict[str, Any]:
    """Reads a Qwen 3 with experts in every layer."""
    refuse(config, {"mlp_only_layers": [], "decoder_sparse_step": 1, "layer_types": None})
    bias = bool(config.get("attention_bias"))
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    experts = expert_fields(
        config, n_experts=128, k=8, normalised=config.get("norm_topk_prob", False)
    )
    defaults = {"num_key_value_heads": 4, "bos_token_id": None, "eos_token_id": None}
    size = count({"moe_intermediate_size": 768, **config}, "moe_intermediate_size")
    plain = plain_fields(
        {**defaults, **config, "intermediate_size": size, **DENSE}, max_length=32768
    )
    windows = window_fields(config, window, [window is not None] * plain["n_layers"])
    return {**plain, **experts, **windows, "qk_norm": True, "qkv_bias": bias, "o_bias": bias}


def read_mixtral(config: Config) -> dict[str, Any]:
    """Reads a Mixtral: a Mistral with experts."""
    refuse(config, {"router_jitter_noise": 0.0})
    experts = expert_fields(config, n_experts=8, k=2, normalised=True)
    defaults = {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None}
    return read_mistral({**defaults, **config, **DENSE}) | experts


def read_olmo2(config: Config) -> dict[str, Any]:
    """Reads an OLMo 2: norms after attention and MLP alone, q/k norms over all heads together."""
    bias = bool(config.get("attention_bias"))
    refuse(config, {"clip_qkv": None})
    defaults = {"rms_norm_eps": 1e-5, "bos_token_id": None, "eos_token_id": 50279}
    norms = {"pre_norms": False, "post_norms": True, "qk_norm": True, "wide_qk_norm": True}
    return {
        **plain_fields({**defaults, **config}, max_length=2048),
        **norms,
        "qkv_bias": bias,
        "o_bias": bias,
    }


def read_olmo3(config: Config) -> dict[str, Any]:
    """Reads an OLMo 3: an OLMo 2 with a sliding window in some layers."""
    config = {"max_position_embeddings": 2048, **config}
    full, local = ropes_by_kind(config)
    given: Any = config.get("rope_scaling") or {}
    scaling = {**full, **given}
    sliding = [(i + 1) % 4 != 0 for i in range(count(config, "num_hidden_layers"))]
    return {
        **read_olmo2({**config, "rope_parameters": None, "rope_scaling": None}),
        **read_rope(config, scaling, full.get("rope_theta", config.get("rope_theta", 5e5))),
        **window_fields(config, config.get("sliding_window", 4096), sliding),
        # whatever "rope_theta" says, as in transformers
        "rope_theta_sliding": float(local.get("rope_theta", 5e5)),
    }


def read_smollm3(config: Config) -> dict[str, Any]:
    """Reads a SmolLM 3: layers without rotary positions."""
    refuse(config, {"mlp_bias": False})
    n_layers, bias = count(config, "num_hidden_layers"), bool(config.get("attention_bias"))
    given, interval = config.get("no_rope_layers"), config.get("no_rope_layer_interval", 4)
    if given is not None and len(given) < n_layers:
        raise UserError(
            f"config.json: no_rope_layers lists {len(given)} layers, num_hidden_layers says {n_layers}"
        )
    rotated = (
        [(i + 1) % interval != 0 for i in range(n_layers)]
        if given is None
        else [entry == 1 for entry in given[:n_layers]]
    )
    window = config.get("sliding_window") if config.get("use_sliding_window", False) else None
    ids = {"bos_token_id": 128_000, "eos_token_id": 128_001}
    defaults = {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 2e6, **ids}
    return {
        **plain_fields({**defaults, **config}, max_length=32768),
        **window_fields(config, window, [window is not None and not turns for turns in rotated]),
        "rotated": tuple(rotated),
        "qkv_bias": bias,
        "o_bias": bias,
    }
