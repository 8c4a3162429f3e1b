"""Model shapes, read from the `config.json` of a Hugging Face folder."""

from __future__ import annotations

import dataclasses
from typing import Any

from kafjax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A Gemma 3 text decoder (Gemma Team 2025). `sliding[i]` says whether layer i sees only the last `window` tokens;
    `tied` whether the embedding also makes the logits."""

    vocab_size: int
    hidden_size: int
    mlp_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    sliding: tuple[bool, ...]
    window: int
    rope_theta: float = 1e6
    rope_theta_sliding: float = 1e4
    rope_factor: float = 1.0
    attention_scale: float = 256**-0.5
    norm_eps: float = 1e-6
    tied: bool = True
    max_length: int = 32768
    bos_id: int = 2
    eos_id: int = 1

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> DecoderConfig:
        """Raises `UserError` for a missing key or a setting that this decoder does not compute."""
        _refuse(config, {"attention_bias": False, "tie_word_embeddings": True, "final_logit_softcapping": None,
                         "attn_logit_softcapping": None, "hidden_activation": "gelu_pytorch_tanh", "use_bidirectional_attention": False})
        n_heads, n_kv_heads = _count(config, "num_attention_heads"), _count(config, "num_key_value_heads")
        if n_heads % n_kv_heads:
            raise UserError(f"config.json: num_attention_heads={n_heads} is no multiple of num_key_value_heads={n_kv_heads}")
        ropes = config.get("rope_parameters") or {}
        full, local = ropes.get("full_attention") or {}, ropes.get("sliding_attention") or {}
        if (kind := _rope_type(local)) != "default":
            raise UserError(f"config.json: rope_type='{kind}' is not supported for sliding_attention layers (only 'default')")
        eos = config.get("eos_token_id", 1)
        return cls(
            vocab_size=_count(config, "vocab_size"),
            hidden_size=_count(config, "hidden_size"),
            mlp_size=_count(config, "intermediate_size"),
            n_layers=_count(config, "num_hidden_layers"),
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=_count(config, "head_dim"),
            sliding=_sliding_layers(config),
            window=_count(config, "sliding_window"),
            rope_theta=float(full.get("rope_theta", config.get("rope_theta", 1e6))),
            rope_theta_sliding=float(local.get("rope_theta", config.get("rope_local_base_freq", 1e4))),
            rope_factor=_rope_factor(config.get("rope_scaling") or full),
            attention_scale=float(config.get("query_pre_attn_scalar", 256)) ** -0.5,
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            max_length=config.get("max_position_embeddings", 131072),
            bos_id=config.get("bos_token_id", 2),
            eos_id=eos[0] if isinstance(eos, list) else eos,
        )


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """A BERT encoder (Devlin et al. 2018) with mean pooling (Reimers & Gurevych 2019)."""

    vocab_size: int
    hidden_size: int
    mlp_size: int
    n_layers: int
    n_heads: int
    max_length: int = 512
    type_vocab_size: int = 2
    norm_eps: float = 1e-12

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> EncoderConfig:
        """Raises `UserError` for a missing key or a setting that this encoder does not compute."""
        _refuse(config, {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False})
        hidden_size, n_heads = _count(config, "hidden_size"), _count(config, "num_attention_heads")
        if hidden_size % n_heads:
            raise UserError(f"config.json: hidden_size={hidden_size} is no multiple of num_attention_heads={n_heads}")
        return cls(
            vocab_size=_count(config, "vocab_size"),
            hidden_size=hidden_size,
            mlp_size=_count(config, "intermediate_size"),
            n_layers=_count(config, "num_hidden_layers"),
            n_heads=n_heads,
            max_length=config.get("max_position_embeddings", 512),
            type_vocab_size=config.get("type_vocab_size", 2),
            norm_eps=float(config.get("layer_norm_eps", 1e-12)),
        )


def _count(config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if value is None:
        raise UserError(f"config.json has no '{key}'; is this the folder of a model?")
    if not isinstance(value, int) or value < 1:
        raise UserError(f"config.json: {key}={value!r} must be a whole number above 0")
    return value


def _rope_type(rope: dict[str, Any]) -> str:
    return rope.get("rope_type", rope.get("type", "default"))  # older files say "type"


def _rope_factor(rope: dict[str, Any]) -> float:
    if (kind := _rope_type(rope)) not in ("default", "linear"):
        raise UserError(f"config.json: rope_type='{kind}' is not supported for gemma3_text (default, linear)")
    if kind == "linear" and "factor" not in rope:
        raise UserError("config.json: rope_type='linear' needs a 'factor'")
    return float(rope["factor"]) if kind == "linear" else 1.0


def _sliding_layers(config: dict[str, Any]) -> tuple[bool, ...]:
    n_layers = _count(config, "num_hidden_layers")
    kinds = config.get("layer_types")
    if kinds is None:
        pattern = config.get("sliding_window_pattern", config.get("_sliding_window_pattern", 6))
        return tuple((i + 1) % pattern != 0 for i in range(n_layers))
    if len(kinds) != n_layers:
        raise UserError(f"config.json: layer_types lists {len(kinds)} layers, num_hidden_layers says {n_layers}")
    for kind in kinds:
        if kind not in ("sliding_attention", "full_attention"):
            raise UserError(f"config.json: layer type '{kind}' is not supported (sliding_attention, full_attention)")
    return tuple(kind == "sliding_attention" for kind in kinds)


def _refuse(config: dict[str, Any], supported: dict[str, Any]) -> None:
    for key, value in supported.items():
        if config.get(key, value) not in (value, None):
            raise UserError(f"config.json: {key}={config[key]!r} is not supported for {config.get('model_type')} (only {value!r})")
