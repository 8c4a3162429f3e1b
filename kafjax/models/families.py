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
from kafjax.models import gemma_family, llama_family
from kafjax.models.family_fields import refuse
from kafjax.models.ropes import Config
from kafjax.models.settings import check_settings

# Of the text part of a multimodal Gemma 3, whose files leave out what is the default.
_GEMMA3_DEFAULTS = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
}
_NEVER = {"quantization_config": None}  # in any family
_CAUSAL = {"use_bidirectional_attention": False}


def read(config: Config) -> dict[str, Any]:
    """Reads the fields of a `DecoderConfig`. Raises `UserError` for another family, a missing key,
    or a setting that is not computed."""
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
    """Returns the text model of a multimodal one. What stands outside counts for it too."""
    text = config.get("text_config")
    if not isinstance(text, dict):
        raise UserError(
            f"config.json has no 'text_config'; is this the folder of a {config['model_type']}?"
        )
    outer = ("bos_token_id", "eos_token_id", "tie_word_embeddings")
    return text | {key: config[key] for key in outer if config.get(key) is not None}


_READERS: dict[str, Callable[[Config], dict[str, Any]]] = {
    "gemma4_text": gemma_family.read_gemma4,
    "gemma4": _gemma4_multimodal,
    "gemma3_text": gemma_family.read_gemma3,
    "gemma3": _gemma3_multimodal,
    "gemma2": gemma_family.read_gemma2,
    "llama": llama_family.read_llama,
    "mistral": llama_family.read_mistral,
    "mistral3": _mistral3_multimodal,
    "ministral3": llama_family.read_ministral3,
    "phi3": llama_family.read_phi3,
    "qwen2": llama_family.read_qwen2,
    "qwen3": llama_family.read_qwen3,
    "qwen3_moe": llama_family.read_qwen3_moe,
    "mixtral": llama_family.read_mixtral,
    "olmo2": llama_family.read_olmo2,
    "olmo3": llama_family.read_olmo3,
    "smollm3": llama_family.read_smollm3,
}
