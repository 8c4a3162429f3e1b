"""Types and ranges of what a `config.json` holds, checked once where it is read.

A published file may give a key as null; whether that means its default, or nothing that can be
computed, is said here by key. A number that no machine holds is refused at once, not when its
arrays are made.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from kafjax.core.errors import UserError
from kafjax.core.text import shortened

_COUNTS = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "sliding_window": 2**40,
    "max_position_embeddings": 2**40,
    "original_max_position_embeddings": 2**40,
    "sliding_window_pattern": 10_000,
    "_sliding_window_pattern": 10_000,
    "type_vocab_size": 2**16,
    "no_rope_layer_interval": 10_000,
    "num_experts": 2**16,
    "num_local_experts": 2**16,
    "num_experts_per_tok": 2**16,
    "moe_intermediate_size": 2**22,
    "global_head_dim": 2**16,
    "num_global_key_value_heads": 2**16,
    "vocab_size_per_layer_input": 2**24,
}
"""Whole numbers above 0, and the highest that is read."""
_COUNTS_FROM_0 = {"num_kv_shared_layers": 10_000, "hidden_size_per_layer_input": 2**16}
_POSITIVE = {
    "rms_norm_eps",
    "layer_norm_eps",
    "rope_theta",
    "rope_local_base_freq",
    "query_pre_attn_scalar",
    "factor",
}
_POSITIVE |= {
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "partial_rotary_factor",
}
_POSITIVE |= {"attn_logit_softcapping", "final_logit_softcapping"}
_NOT_NEGATIVE = {"mscale", "mscale_all_dim", "llama_4_scaling_beta"}
_SWITCHES = {
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
    "is_decoder",
    "use_sliding_window",
    "truncate",
    "norm_topk_prob",
    "attention_k_eq_v",
    "use_double_wide_mlp",
    "enable_moe_block",
}
_MAY_BE_NULL = {
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "sliding_window_pattern",
    "_sliding_window_pattern",
}
_MAY_BE_NULL |= {
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "partial_rotary_factor",
    *_NOT_NEGATIVE,
}
_MAY_BE_NULL |= {"attn_logit_softcapping", "final_logit_softcapping"}
_MAY_BE_NULL |= {
    "num_experts",
    "num_local_experts",
    "moe_intermediate_size",
    "num_global_key_value_heads",
    *_COUNTS_FROM_0,
}
_MAY_BE_NULL |= {"attention_bias", "mlp_bias"}  # which transformers takes for false
_ROPES = ("rope_scaling", "rope_parameters", "full_attention", "sliding_attention")


def check_settings(config: Mapping[str, Any], where: str = "config.json") -> None:
    """Checks every key that is computed with, wherever it stands in the file.

    Raises:
      UserError: naming key and value, for another type, a value out of range, not finite, or null
        where that means nothing.
    """
    ropes = [config[key] for key in _ROPES if isinstance(config.get(key), dict)]
    theta_is_nested = any(
        "rope_theta" in rope or any("rope_theta" in r for r in rope.values() if isinstance(r, dict))
        for rope in ropes
    )
    for key, value in config.items():
        if (most := _COUNTS.get(key, _COUNTS_FROM_0.get(key))) is not None:
            least = 1 if key in _COUNTS else 0
            if value is None and key in _MAY_BE_NULL:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise UserError(
                    f"{where}: {key}={shortened(value)} must be a whole number from {least} to {most}"
                )
        elif key in _POSITIVE or key in _NOT_NEGATIVE:
            if value is None and (key in _MAY_BE_NULL or (key == "rope_theta" and theta_is_nested)):
                continue
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not (
                0 < value <= sys.float_info.max or (value == 0 and key in _NOT_NEGATIVE)
            ):
                raise UserError(
                    f"{where}: {key}={shortened(value)} must be a number {'above' if key in _POSITIVE else 'from'} 0"
                )
        elif key in _SWITCHES:
            if not isinstance(value, bool) and not (value is None and key in _MAY_BE_NULL):
                raise UserError(f"{where}: {key}={shortened(value)} must be true or false")
        elif key == "bos_token_id":
            if value is not None and (
                not isinstance(value, int) or isinstance(value, bool) or value < 0
            ):
                raise UserError(
                    f"{where}: {key}={shortened(value)} must be a token's number, or null"
                )
        elif key == "no_rope_layers":
            if value is not None and not (
                isinstance(value, list) and all(entry in (0, 1) for entry in value)
            ):
                raise UserError(f"{where}: {key}={shortened(value)} must be a list of 0 and 1")
        elif key == "layer_types":
            if value is not None and not (
                isinstance(value, list) and all(isinstance(kind, str) for kind in value)
            ):
                raise UserError(f"{where}: {key}={shortened(value)} must be a list of names")
        elif key == "per_layer_config" and value is not None:
            if not isinstance(value, dict) or not all(
                isinstance(layer, dict) for layer in value.values()
            ):
                raise UserError(f"{where}: {key}={shortened(value)} must be an object of objects")
            for number, layer in value.items():
                check_settings(layer, f"{where}: {key}: {shortened(number)}")
        elif key in _ROPES and value is not None:
            if not isinstance(value, dict):
                raise UserError(f"{where}: {key}={shortened(value)} must be an object")
            check_settings(value, f"{where}: {key}")
