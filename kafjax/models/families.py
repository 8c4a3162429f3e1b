"""Families of decoders as `config.json` tells them: its keys -> the fields of a `DecoderConfig`, and back.

Each family is one way to set the decoder's switches:

    gemma3_text   norms before and after with (1 + w), q/k norms, GELU, scaled embedding, a rotary base for sliding layers
    llama         norms before, SiLU, rotary frequencies stretched from Llama 3.1 on
    mistral       as llama, with a sliding window in every layer or in none
    qwen2         as llama, with biases on q, k and v
    qwen3         as llama, with q/k norms

A setting that the decoder does not compute is refused by its name. Defaults are transformers'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kafjax.core.errors import UserError, nearest
from kafjax.models.settings import check_settings
from kafjax.ops.rope import Llama3Stretch

Config = Mapping[str, Any]

# Of the text part of a multimodal Gemma 3, whose files leave out what is the default.
_GEMMA3_DEFAULTS = {"vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096}
_NEVER = {  # in any family
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
    "num_experts": None,
    "num_local_experts": None,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "use_bidirectional_attention": False,
}
_PLAIN: dict[str, Any] = {
    "norm_offset": 0.0,
    "post_norms": False,
    "qk_norm": False,
    "activation": "silu",
    "scale_embedding": False,
    "rope_theta_sliding": None,
}


def read(config: Config) -> dict[str, Any]:
    """The fields of a `DecoderConfig`. Raises `UserError` for another family, a missing key, or a setting that is not computed."""
    family = config.get("model_type")
    if not isinstance(family, str) or family not in _READERS:
        raise UserError(f"config.json: model_type '{family}' is no decoder that is supported. {nearest(str(family), _READERS)}")
    refuse(config, _NEVER)
    check_settings(config)
    return _READERS[family](config)


def write(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of a Hugging Face folder; `fields` are those of a `DecoderConfig`, nested ones as dicts."""
    family = fields["family"]
    config = {
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
        "eos_token_id": [fields["eos_id"], *fields["also_eos_ids"]] if fields["also_eos_ids"] else fields["eos_id"],
        "tie_word_embeddings": fields["tied"],
        "rope_theta": fields["rope_theta"],
        "rope_scaling": _written_scaling(fields),
        "sliding_window": fields["window"],
    }
    kinds = ["sliding_attention" if sliding else "full_attention" for sliding in fields["sliding"]]
    if family == "gemma3_text":
        config |= {"layer_types": kinds, "rope_local_base_freq": fields["rope_theta_sliding"], "attention_bias": fields["o_bias"]}
        config |= {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": round(fields["attention_scale"] ** -2)}
        return config
    config["hidden_act"] = "silu"
    if family in ("llama", "qwen3"):
        config["attention_bias"] = fields["o_bias"]
    if family in ("qwen2", "qwen3"):
        config |= {"layer_types": kinds, "use_sliding_window": fields["window"] is not None}
    return config


def count(config: Config, key: str) -> int:
    """Raises `UserError` where `config[key]` is missing or no positive whole number."""
    value = config.get(key)
    if value is None:
        raise UserError(f"config.json has no '{key}'; is this the folder of a model?")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"config.json: {key}={value!r} must be a whole number above 0")
    return value


def refuse(config: Config, supported: Config) -> None:
    """Raises `UserError` naming the first key that is set to something else than the one supported value."""
    for key, value in supported.items():
        if config.get(key, value) not in (value, None):
            only = "" if value is None else f" (only {value!r})"
            raise UserError(f"config.json: {key}={config[key]!r} is not supported for {config.get('model_type')}{only}")


def _gemma3(config: Config) -> dict[str, Any]:
    refuse(config, {"hidden_activation": "gelu_pytorch_tanh"})
    ropes = config.get("rope_parameters") or {}
    full, local = ropes.get("full_attention") or {}, ropes.get("sliding_attention") or {}
    if (kind := _rope_type(local)) != "default":
        raise UserError(f"config.json: rope_type='{kind}' is not supported for sliding_attention layers (only 'default')")
    scaling = config.get("rope_scaling") or full
    if _rope_type(scaling) == "llama3":
        raise UserError("config.json: rope_type='llama3' is not supported for gemma3_text (default, linear)")
    bias = bool(config.get("attention_bias"))
    return {
        **_shape(config, count(config, "head_dim")),
        **_rope(config, scaling, full.get("rope_theta", config.get("rope_theta", 1e6))),
        **_layers(config, count(config, "sliding_window"), _gemma3_sliding(config)),
        "family": "gemma3_text",
        "rope_theta_sliding": float(local.get("rope_theta", config.get("rope_local_base_freq", 1e4))),
        "attention_scale": float(config.get("query_pre_attn_scalar", 256)) ** -0.5,
        "qkv_bias": bias,
        "o_bias": bias,
        "tied": config.get("tie_word_embeddings", True),
        "max_length": config.get("max_position_embeddings", 131072),
        "bos_id": config.get("bos_token_id", 2),
        **_eos({"eos_token_id": 1, **config}),
    }


def _gemma3_multimodal(config: Config) -> dict[str, Any]:
    text = config.get("text_config")
    if not isinstance(text, dict):
        raise UserError("config.json has no 'text_config'; is this the folder of a Gemma 3?")
    outer = {key: config[key] for key in ("bos_token_id", "eos_token_id", "tie_word_embeddings") if config.get(key) is not None}
    return {**read({**_GEMMA3_DEFAULTS, **text, **outer, "model_type": "gemma3_text"}), "multimodal": True}


def _gemma3_sliding(config: Config) -> list[bool]:
    pattern = config.get("sliding_window_pattern", config.get("_sliding_window_pattern", 6))
    return [(i + 1) % pattern != 0 for i in range(count(config, "num_hidden_layers"))]


def _llama(config: Config) -> dict[str, Any]:
    refuse(config, {"mlp_bias": False, "layer_types": None, "sliding_window": None})
    bias = bool(config.get("attention_bias"))
    return {**_plain(config, max_length=2048), "qkv_bias": bias, "o_bias": bias}


def _mistral(config: Config) -> dict[str, Any]:
    refuse(config, {"attention_bias": False, "layer_types": None})
    window = config.get("sliding_window", 4096)
    n_layers = count(config, "num_hidden_layers")
    return {**_plain({"num_key_value_heads": 8, **config}, max_length=131072), **_layers(config, window, [window is not None] * n_layers)}


def _qwen2(config: Config) -> dict[str, Any]:
    return {**_qwen(config), "qkv_bias": True}


def _qwen3(config: Config) -> dict[str, Any]:
    bias = bool(config.get("attention_bias"))
    return {**_qwen({"head_dim": 128, **config}), "qk_norm": True, "qkv_bias": bias, "o_bias": bias}


def _qwen(config: Config) -> dict[str, Any]:
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window", False) else None
    first = config.get("max_window_layers", 28)
    sliding = [window is not None and i >= first for i in range(count(config, "num_hidden_layers"))]
    defaults = {"num_key_value_heads": 32, "bos_token_id": None, "eos_token_id": None}
    return {**_plain({**defaults, **config}, max_length=32768), **_layers(config, window, sliding)}


_READERS: dict[str, Callable[[Config], dict[str, Any]]] = {
    "gemma3_text": _gemma3,
    "gemma3": _gemma3_multimodal,
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}
_ARCHITECTURES = {
    "gemma3_text": "Gemma3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def _plain(config: Config, *, max_length: int) -> dict[str, Any]:
    """Fields shared by llama, mistral and the qwens; `max_length` is the default of a file that has none."""
    refuse(config, {"hidden_act": "silu"})
    hidden_size, n_heads = count(config, "hidden_size"), count(config, "num_attention_heads")
    if config.get("head_dim") is None and hidden_size % n_heads:
        raise UserError(f"config.json: no head_dim, and hidden_size={hidden_size} is no multiple of num_attention_heads={n_heads}")
    head_dim = count({"head_dim": hidden_size // n_heads, **_given(config)}, "head_dim")
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if nested := {"full_attention", "sliding_attention"} & set(scaling):
        raise UserError(f"config.json: rope_parameters by kind of layer ({min(nested)}) are not supported for {config['model_type']}")
    refuse({"model_type": config["model_type"], **scaling}, {"partial_rotary_factor": 1.0})
    return {
        **_shape({"num_key_value_heads": n_heads, **_given(config)}, head_dim),
        **_rope(config, scaling, scaling.get("rope_theta", config.get("rope_theta", 1e4))),
        **_PLAIN,
        "sliding": (False,) * count(config, "num_hidden_layers"),
        "window": None,
        "family": config["model_type"],
        "attention_scale": head_dim**-0.5,
        "tied": config.get("tie_word_embeddings", False),
        "max_length": config.get("max_position_embeddings", max_length),
        "bos_id": config.get("bos_token_id", 1),
        **_eos({"eos_token_id": 2, **config}),
    }


def _given(config: Config) -> Config:
    return {key: value for key, value in config.items() if value is not None}


def _shape(config: Config, head_dim: int) -> dict[str, Any]:
    n_heads, n_kv_heads = count(config, "num_attention_heads"), count(config, "num_key_value_heads")
    if n_heads % n_kv_heads:
        raise UserError(f"config.json: num_attention_heads={n_heads} is no multiple of num_key_value_heads={n_kv_heads}")
    return {
        "vocab_size": count(config, "vocab_size"),
        "hidden_size": count(config, "hidden_size"),
        "mlp_size": count(config, "intermediate_size"),
        "n_layers": count(config, "num_hidden_layers"),
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "head_dim": head_dim,
        "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
    }


def _layers(config: Config, window: int | None, sliding: list[bool]) -> dict[str, Any]:
    """Marks the sliding layers: by `layer_types`, else `sliding`."""
    kinds = config.get("layer_types")
    if kinds is not None:
        if len(kinds) != len(sliding):
            raise UserError(f"config.json: layer_types lists {len(kinds)} layers, num_hidden_layers says {len(sliding)}")
        for kind in kinds:
            if kind not in ("sliding_attention", "full_attention"):
                raise UserError(f"config.json: layer type '{kind}' is not supported (sliding_attention, full_attention)")
        sliding = [kind == "sliding_attention" for kind in kinds]
    if any(sliding) and window is None:
        raise UserError("config.json: layers of type sliding_attention, and no sliding_window")
    return {"sliding": tuple(sliding), "window": window}


def _eos(config: Config) -> dict[str, Any]:
    """A file names one token, several or none; the first one ends a text that is trained on, each one a reply."""
    given, vocab_size = config.get("eos_token_id"), count(config, "vocab_size")
    if given is None or given == []:
        return {"eos_id": None, "also_eos_ids": ()}
    ids = given if isinstance(given, list) else [given]
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocab_size for i in ids):
        raise UserError(f"config.json: eos_token_id={given!r} must be tokens of the vocabulary of {vocab_size}")
    return {"eos_id": ids[0], "also_eos_ids": tuple(ids[1:])}


def _rope_type(rope: Config) -> str:
    return rope.get("rope_type", rope.get("type", "default"))  # older files say "type"


def _rope(config: Config, scaling: Config, theta: float) -> dict[str, Any]:
    kind = _rope_type(scaling)
    if kind not in ("default", "linear", "llama3"):
        raise UserError(f"config.json: rope_type='{kind}' is not supported (default, linear, llama3)")
    for key in {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}[kind]:
        if key not in scaling:
            raise UserError(f"config.json: rope_type='{kind}' needs a '{key}'")
    stretch = None
    if kind == "llama3":
        original = scaling.get("original_max_position_embeddings", config.get("max_position_embeddings"))
        stretch = Llama3Stretch(float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"]), int(original))
    factor = float(scaling["factor"]) if kind != "default" else 1.0
    return {"rope_theta": float(theta), "rope_factor": factor, "rope_stretch": stretch}


def _written_scaling(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    if (stretch := fields["rope_stretch"]) is not None:
        return {
            "rope_type": "llama3",
            "factor": fields["rope_factor"],
            "low_freq_factor": stretch["low"],
            "high_freq_factor": stretch["high"],
            "original_max_position_embeddings": stretch["original_length"],
        }
    return None if fields["rope_factor"] == 1 else {"rope_type": "linear", "factor": fields["rope_factor"]}
