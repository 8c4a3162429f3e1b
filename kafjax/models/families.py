"""Families of decoders as `config.json` tells them: its keys -> the fields of a `DecoderConfig`
(`written` is the way back).

Each family is one way to set the decoder's switches:

    gemma3_text   norms before and after with (1 + w), q/k norms, GELU, scaled embedding, a rotary base for sliding layers
    gemma4_text   as gemma3_text with norms of w, layers of several shapes, shared keys and values, and per-layer embeddings
    gemma2        as gemma3_text, without q/k norms and that base, with caps of attention scores and logits
    llama         norms before, SiLU, rotary frequencies stretched from Llama 3.1 on
    mistral       as llama, with a sliding window in every layer or in none
    ministral3    as mistral, with YaRN, and queries that grow with their position
    phi3          as mistral, with a part of each head that does not turn, and LongRoPE; its files join q, k, v, and gate and up
    qwen2         as llama, with biases on q, k and v
    qwen3         as llama, with q/k norms
    qwen3_moe     as qwen3, with experts
    mixtral       as mistral, with experts
    olmo2         as llama, but norms after attention and MLP alone, and q/k norms over all heads together
    olmo3         as olmo2, with a sliding window in some layers
    smollm3       as llama, with layers that have no rotary positions

A setting that the decoder does not compute is refused by its name. Defaults are transformers'.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kafjax.core.errors import UserError, nearest
from kafjax.models import gemma4
from kafjax.models.ropes import Config, read_long_rope, read_rope, rope_type
from kafjax.models.settings import check_settings
from kafjax.ops.rope import QueryGrowth

# Of the text part of a multimodal Gemma 3, whose files leave out what is the default.
_GEMMA3_DEFAULTS = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
}
_MINISTRAL3_ROPE = {  # of a file that has none
    **{
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
    },
    **{"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
}
_NEVER = {"quantization_config": None}  # in any family
_CAUSAL = {"use_bidirectional_attention": False}
_DENSE = {"num_experts": None, "num_local_experts": None}
_UNCAPPED = {"final_logit_softcapping": None, "attn_logit_softcapping": None}
_PLAIN: dict[str, Any] = {
    "norm_offset": 0.0,
    "post_norms": False,
    "qk_norm": False,
    "activation": "silu",
    "scale_embedding": False,
    "rope_theta_sliding": None,
}


def read(config: Config) -> dict[str, Any]:
    """The fields of a `DecoderConfig`. Raises `UserError` for another family, a missing key, or a
    setting that is not computed."""
    family = config.get("model_type")
    if not isinstance(family, str) or family not in _READERS:
        raise UserError(
            f"config.json: model_type '{family}' is no decoder that is supported. {nearest(str(family), _READERS)}"
        )
    refuse(config, _NEVER)
    if config.get("use_bidirectional_attention") != "vision":  # which is of images alone
        refuse(config, _CAUSAL)
    check_settings(config)
    return _READERS[family](config)


def count(config: Config, key: str) -> int:
    """Raises `UserError` where `config[key]` is missing or no positive whole number."""
    value = config.get(key)
    if value is None:
        raise UserError(f"config.json has no '{key}'; is this the folder of a model?")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"config.json: {key}={value!r} must be a whole number above 0")
    return value


def refuse(config: Config, supported: Config) -> None:
    """Raises `UserError` naming the first key that is set to something else than the one supported
    value."""
    for key, value in supported.items():
        if config.get(key, value) not in (value, None):
            only = "" if value is None else f" (only {value!r})"
            raise UserError(
                f"config.json: {key}={config[key]!r} is not supported for {config.get('model_type')}{only}"
            )


def _gemma3(config: Config) -> dict[str, Any]:
    refuse(config, _UNCAPPED)
    full, local = _ropes_by_kind(config)
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


def _gemma2(config: Config) -> dict[str, Any]:
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
        **_one_rope(config, 1e4),
        "rope_theta_sliding": None,
        "qk_norm": False,
        "attention_cap": attention_cap,
        "logit_cap": logit_cap,
    }


def _gemma4(config: Config) -> dict[str, Any]:
    refuse(config, gemma4.REFUSED)
    # there are none without their block
    config = {**gemma4.DEFAULTS, **config, "query_pre_attn_scalar": 1, "num_experts": None}
    full, local = _ropes_by_kind(config)
    return gemma4.read(config, _gemma(config, pattern=6, max_length=131072), full, local)


def _gemma(config: Config, *, pattern: int, max_length: int) -> dict[str, Any]:
    """Reads the settings that the Gemmas have in common; one in `pattern` layers sees everything,
    unless the file names them."""
    refuse(config, {"hidden_activation": "gelu_pytorch_tanh", **_DENSE})
    bias = bool(config.get("attention_bias"))
    sliding = [(i + 1) % pattern != 0 for i in range(count(config, "num_hidden_layers"))]
    return {
        **_shape(config, count(config, "head_dim")),
        **_layers(config, count(config, "sliding_window"), sliding),
        "family": config["model_type"],
        "attention_scale": float(config.get("query_pre_attn_scalar", 256)) ** -0.5,
        "qkv_bias": bias,
        "o_bias": bias,
        "tied": config.get("tie_word_embeddings", True),
        "max_length": config.get("max_position_embeddings", max_length),
        "bos_id": config.get("bos_token_id", 2),
        **_eos({"eos_token_id": 1, **config}),
    }


def _ropes_by_kind(config: Config) -> tuple[Config, Config]:
    """Ropes of full and of sliding layers. Raises `UserError` where sliding ones are scaled."""
    ropes = config.get("rope_parameters") or {}
    full, local = ropes.get("full_attention") or {}, ropes.get("sliding_attention") or {}
    read_rope(config, local, 1.0, allowed=("default",), whose="sliding_attention layers")
    return full, local


def _gemma3_multimodal(config: Config) -> dict[str, Any]:
    text = read({**_GEMMA3_DEFAULTS, **_text_config(config), "model_type": "gemma3_text"})
    return {**text, "multimodal": True}


def _gemma4_multimodal(config: Config) -> dict[str, Any]:
    return {**read({**_text_config(config), "model_type": "gemma4_text"}), "multimodal": True}


def _mistral3_multimodal(config: Config) -> dict[str, Any]:
    text = {"model_type": "mistral", "tie_word_embeddings": True, **_text_config(config)}
    if text["model_type"] not in ("mistral", "ministral3"):
        raise UserError(
            f"config.json: text_config of model_type '{text['model_type']}' is not supported (mistral, ministral3)"
        )
    return {**read(text), "multimodal": True}


def _text_config(config: Config) -> dict[str, Any]:
    """The text model of a multimodal one. What stands outside counts for it too."""
    text = config.get("text_config")
    if not isinstance(text, dict):
        raise UserError(
            f"config.json has no 'text_config'; is this the folder of a {config['model_type']}?"
        )
    outer = ("bos_token_id", "eos_token_id", "tie_word_embeddings")
    return text | {key: config[key] for key in outer if config.get(key) is not None}


def _llama(config: Config) -> dict[str, Any]:
    refuse(config, {"mlp_bias": False, "layer_types": None, "sliding_window": None})
    bias = bool(config.get("attention_bias"))
    return {**_plain(config, max_length=2048), "qkv_bias": bias, "o_bias": bias}


def _mistral(config: Config) -> dict[str, Any]:
    refuse(config, {"attention_bias": False, "layer_types": None})
    window = config.get("sliding_window", 4096)
    n_layers = count(config, "num_hidden_layers")
    return {
        **_plain({"num_key_value_heads": 8, **config}, max_length=131072),
        **_layers(config, window, [window is not None] * n_layers),
    }


def _ministral3(config: Config) -> dict[str, Any]:
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
    fields = _mistral({**config, "rope_scaling": None, "rope_parameters": rope})
    return fields | {"query_growth": QueryGrowth(float(beta), length) if beta else None}


def _phi3(config: Config) -> dict[str, Any]:
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
    fields = _mistral({**config, "rope_scaling": None, "rope_parameters": plain_rope})
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


def _qwen2(config: Config) -> dict[str, Any]:
    return {**_qwen(config), "qkv_bias": True}


def _qwen3(config: Config) -> dict[str, Any]:
    bias = bool(config.get("attention_bias"))
    return {**_qwen({"head_dim": 128, **config}), "qk_norm": True, "qkv_bias": bias, "o_bias": bias}


def _olmo2(config: Config) -> dict[str, Any]:
    bias = bool(config.get("attention_bias"))
    refuse(config, {"clip_qkv": None})
    defaults = {"rms_norm_eps": 1e-5, "bos_token_id": None, "eos_token_id": 50279}
    norms = {"pre_norms": False, "post_norms": True, "qk_norm": True, "wide_qk_norm": True}
    return {
        **_plain({**defaults, **config}, max_length=2048),
        **norms,
        "qkv_bias": bias,
        "o_bias": bias,
    }


def _olmo3(config: Config) -> dict[str, Any]:
    config = {"max_position_embeddings": 2048, **config}
    full, local = _ropes_by_kind(config)
    given: Any = config.get("rope_scaling") or {}
    scaling = {**full, **given}
    sliding = [(i + 1) % 4 != 0 for i in range(count(config, "num_hidden_layers"))]
    return {
        **_olmo2({**config, "rope_parameters": None, "rope_scaling": None}),
        **read_rope(config, scaling, full.get("rope_theta", config.get("rope_theta", 5e5))),
        **_layers(config, config.get("sliding_window", 4096), sliding),
        # whatever "rope_theta" says, as in transformers
        "rope_theta_sliding": float(local.get("rope_theta", 5e5)),
    }


def _qwen3_moe(config: Config) -> dict[str, Any]:
    refuse(config, {"mlp_only_layers": [], "decoder_sparse_step": 1, "layer_types": None})
    bias = bool(config.get("attention_bias"))
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    experts = _experts(config, n_experts=128, k=8, normalised=config.get("norm_topk_prob", False))
    defaults = {"num_key_value_heads": 4, "bos_token_id": None, "eos_token_id": None}
    size = count({"moe_intermediate_size": 768, **config}, "moe_intermediate_size")
    plain = _plain({**defaults, **config, "intermediate_size": size, **_DENSE}, max_length=32768)
    windows = _layers(config, window, [window is not None] * plain["n_layers"])
    return {**plain, **experts, **windows, "qk_norm": True, "qkv_bias": bias, "o_bias": bias}


def _mixtral(config: Config) -> dict[str, Any]:
    refuse(config, {"router_jitter_noise": 0.0})
    experts = _experts(config, n_experts=8, k=2, normalised=True)
    defaults = {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None}
    return _mistral({**defaults, **config, **_DENSE}) | experts


def _experts(config: Config, *, n_experts: int, k: int, normalised: bool) -> dict[str, Any]:
    """Reads how many experts there are and how many a token goes through, by default `n_experts`
    and `k`."""
    named = next((key for key in _DENSE if config.get(key) is not None), "num_experts")
    total = count({named: n_experts, **_given(config)}, named)
    chosen = count({"num_experts_per_tok": k, **config}, "num_experts_per_tok")
    if chosen > total:
        raise UserError(f"config.json: num_experts_per_tok={chosen} is above {named}={total}")
    return {"n_experts": total, "experts_per_token": chosen, "normalised_shares": normalised}


def _smollm3(config: Config) -> dict[str, Any]:
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
        **_plain({**defaults, **config}, max_length=32768),
        **_layers(config, window, [window is not None and not turns for turns in rotated]),
        "rotated": tuple(rotated),
        "qkv_bias": bias,
        "o_bias": bias,
    }


def _qwen(config: Config) -> dict[str, Any]:
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window", False) else None
    first = config.get("max_window_layers", 28)
    sliding = [window is not None and i >= first for i in range(count(config, "num_hidden_layers"))]
    defaults = {"num_key_value_heads": 32, "bos_token_id": None, "eos_token_id": None}
    return {**_plain({**defaults, **config}, max_length=32768), **_layers(config, window, sliding)}


_READERS: dict[str, Callable[[Config], dict[str, Any]]] = {
    "gemma4_text": _gemma4,
    "gemma4": _gemma4_multimodal,
    "gemma3_text": _gemma3,
    "gemma3": _gemma3_multimodal,
    "gemma2": _gemma2,
    "llama": _llama,
    "mistral": _mistral,
    "mistral3": _mistral3_multimodal,
    "ministral3": _ministral3,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "olmo2": _olmo2,
    "olmo3": _olmo3,
    "smollm3": _smollm3,
}


def _plain(config: Config, *, max_length: int) -> dict[str, Any]:
    """Fields shared by all but the Gemmas; `max_length` is the default of a file that has none."""
    refuse(config, {"hidden_act": "silu", **_UNCAPPED, **_DENSE})
    config = {"max_position_embeddings": max_length, **config}
    hidden_size, n_heads = count(config, "hidden_size"), count(config, "num_attention_heads")
    if config.get("head_dim") is None and hidden_size % n_heads:
        raise UserError(
            f"config.json: no head_dim, and hidden_size={hidden_size} is no multiple of num_attention_heads={n_heads}"
        )
    head_dim = count({"head_dim": hidden_size // n_heads, **_given(config)}, "head_dim")
    return {
        **_shape({"num_key_value_heads": n_heads, **_given(config)}, head_dim),
        **_one_rope(config, 1e4),
        **_PLAIN,
        "sliding": (False,) * count(config, "num_hidden_layers"),
        "window": None,
        "family": config["model_type"],
        "attention_scale": head_dim**-0.5,
        "tied": config.get("tie_word_embeddings", False),
        "max_length": config["max_position_embeddings"],
        "bos_id": config.get("bos_token_id", 1),
        **_eos({"eos_token_id": 2, **config}),
    }


def _one_rope(config: Config, theta: float) -> dict[str, Any]:
    """The rope of all layers; `theta` where the file has none."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if nested := {"full_attention", "sliding_attention"} & set(scaling):
        family = config["model_type"]
        raise UserError(
            f"config.json: rope_parameters by kind of layer ({min(nested)}) are not supported for {family}"
        )
    return read_rope(config, scaling, scaling.get("rope_theta", config.get("rope_theta", theta)))


def _given(config: Config) -> Config:
    return {key: value for key, value in config.items() if value is not None}


def _shape(config: Config, head_dim: int) -> dict[str, Any]:
    n_heads, n_kv_heads = count(config, "num_attention_heads"), count(config, "num_key_value_heads")
    if n_heads % n_kv_heads:
        raise UserError(
            f"config.json: num_attention_heads={n_heads} is no multiple of num_key_value_heads={n_kv_heads}"
        )
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
            raise UserError(
                f"config.json: layer_types lists {len(kinds)} layers, num_hidden_layers says {len(sliding)}"
            )
        for kind in kinds:
            if kind not in ("sliding_attention", "full_attention"):
                raise UserError(
                    f"config.json: layer type '{kind}' is not supported (sliding_attention, full_attention)"
                )
        sliding = [kind == "sliding_attention" for kind in kinds]
    if any(sliding) and window is None:
        raise UserError("config.json: layers of type sliding_attention, and no sliding_window")
    return {"sliding": tuple(sliding), "window": window}


def _eos(config: Config) -> dict[str, Any]:
    """A file names one token, several or none; the first one ends a text that is trained on, each
    one a reply."""
    given, vocab_size = config.get("eos_token_id"), count(config, "vocab_size")
    if given is None or given == []:
        return {"eos_id": None, "also_eos_ids": ()}
    ids = given if isinstance(given, list) else [given]
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocab_size for i in ids):
        raise UserError(
            f"config.json: eos_token_id={given!r} must be tokens of the vocabulary of {vocab_size}"
        )
    return {"eos_id": ids[0], "also_eos_ids": tuple(ids[1:])}
