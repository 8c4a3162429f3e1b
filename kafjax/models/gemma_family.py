"""The Gemmas' `config.json`: norms before and after with (1 + w), GELU, scaled embedding, sliding
layers."""

from __future__ import annotations

from typing import Any

from kafjax.models import gemma4
from kafjax.models.family_fields import (
    DENSE,
    UNCAPPED,
    count,
    end_fields,
    refuse,
    rope_fields,
    ropes_by_kind,
    shape_fields,
    window_fields,
)
from kafjax.models.ropes import Config, read_rope


def read_gemma2(config: Config) -> dict[str, Any]:
    """Reads a Gemma 2: caps of attention scores and logits, one rope."""
    config = {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 4096,
        "max_position_embeddings": 8192,
        **config,
    }
    caps = (
        config.get(key, default)
        for key, default in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0))
    )
    attention_cap, logit_cap = (None if cap is None else float(cap) for cap in caps)
    return {
        **_gemma(config, pattern=2, max_length=8192),
        **rope_fields(config, 1e4),
        "rope_theta_sliding": None,
        "qk_norm": False,
        "attention_cap": attention_cap,
        "logit_cap": logit_cap,
    }


def read_gemma3(config: Config) -> dict[str, Any]:
    """Reads a Gemma 3: a rope of its own for sliding layers."""
    refuse(config, UNCAPPED)
    full, local = ropes_by_kind(config)
    scaling = config.get("rope_scaling") or full
    pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    return {
        **_gemma(config, pattern=pattern, max_length=131072),
        **read_rope(
            config,
            scaling,
            full.get("rope_theta", config.get("rope_theta", 1e6)),
            allowed=("default", "linear"),
        ),
        "rope_theta_sliding": float(
            local.get("rope_theta", config.get("rope_local_base_freq", 1e4))
        ),
    }


def read_gemma4(config: Config) -> dict[str, Any]:
    """Reads a Gemma 4 without experts; `gemma4` has what is its own."""
    refuse(config, gemma4.REFUSED)
    # there are none without their block
    config = {**gemma4.DEFAULTS, **config, "query_pre_attn_scalar": 1, "num_experts": None}
    full, local = ropes_by_kind(config)
    return gemma4.read(config, _gemma(config, pattern=6, max_length=131072), full, local)


def _gemma(config: Config, *, pattern: int, max_length: int) -> dict[str, Any]:
    """Reads the settings that the Gemmas have in common; one in `pattern` layers sees everything,
    unless the file names them."""
    refuse(config, {"hidden_activation": "gelu_pytorch_tanh", **DENSE})
    bias = bool(config.get("attention_bias"))
    sliding = [(i + 1) % pattern != 0 for i in range(count(config, "num_hidden_layers"))]
    return {
        **shape_fields(config, count(config, "head_dim")),
        **window_fields(config, count(config, "sliding_window"), sliding),
        "family": config["model_type"],
        "attention_scale": float(config.get("query_pre_attn_scalar", 256)) ** -0.5,
        "qkv_bias": bias,
        "o_bias": bias,
        "tied": config.get("tie_word_embeddings", True),
        "max_length": config.get("max_position_embeddings", max_length),
        "bos_id": config.get("bos_token_id", 2),
        **end_fields({"eos_token_id": 1, **config}),
    }
