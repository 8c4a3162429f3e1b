"""Gemma 4's own settings in a `config.json`: layers of several shapes, shared keys and values,
embeddings for each layer.

The sizes with experts (`enable_moe_block`) are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kafjax.core.errors import UserError
from kafjax.models.ropes import Config, read_proportional

DEFAULTS = {
    **{
        "num_key_value_heads": 4,
        "head_dim": 256,
        "global_head_dim": 512,
        "sliding_window": 512,
        "hidden_size_per_layer_input": 256,
    },
    **{"vocab_size_per_layer_input": 262_144, "num_kv_shared_layers": 0},
}
REFUSED = {"enable_moe_block": False, "num_local_experts": None, "attn_logit_softcapping": None}
# of a file that has none
_FULL_ROPE = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}


def read(
    config: Config, fields: dict[str, Any], full_rope: Config, sliding_rope: Config
) -> dict[str, Any]:
    """Adds to `fields`, which the Gemmas have in common, what is Gemma 4's.

    Raises `UserError` for numbers that do not fit together.
    """
    full_rope = full_rope or _FULL_ROPE
    # whatever the file says of the last layer, as in transformers
    sliding = (*fields["sliding"][:-1], False)
    n_sharing, size = (
        config["num_kv_shared_layers"] or 0,
        config["hidden_size_per_layer_input"] or 0,
    )
    vocab_size, cap = config["vocab_size_per_layer_input"], config.get("final_logit_softcapping")
    if n_sharing >= fields["n_layers"]:
        raise UserError(
            f"config.json: num_kv_shared_layers={n_sharing} must be below num_hidden_layers={fields['n_layers']}"
        )
    if size and vocab_size < fields["vocab_size"]:
        all_tokens = fields["vocab_size"]
        raise UserError(
            f"config.json: vocab_size_per_layer_input={vocab_size} is below vocab_size={all_tokens}: tokens would have nothing"
        )
    head_dim, n_kv_heads = _of_full_layers(config, sliding)
    if fields["n_heads"] % n_kv_heads:
        raise UserError(
            f"config.json: num_attention_heads={fields['n_heads']} is no multiple of {n_kv_heads} key heads of full_attention"
        )
    return {
        **fields,
        **read_proportional(config, full_rope, full_rope.get("rope_theta", 1e6)),
        "sliding": sliding,
        "rope_theta_sliding": float(sliding_rope.get("rope_theta", 1e4)),
        "norm_offset": 0.0,
        "value_norm": True,
        "logit_cap": None if cap is None else float(cap),
        "full_head_dim": None if head_dim == fields["head_dim"] else head_dim,
        "full_kv_heads": None if n_kv_heads == fields["n_kv_heads"] else n_kv_heads,
        "keys_as_values": bool(config.get("attention_k_eq_v")),
        "n_sharing": n_sharing,
        "sharing_mlp_size": 2 * fields["mlp_size"]
        if config.get("use_double_wide_mlp") and n_sharing
        else None,
        "per_layer_size": size,
        "per_layer_vocab": vocab_size if size else 0,
        "layer_scalar": True,
    }


def _of_full_layers(config: Config, sliding: tuple[bool, ...]) -> tuple[int, int]:
    """Reads head size and number of key heads of the layers that do not slide.

    Published files have two keys for them, and transformers writes `per_layer_config`, which then
    counts alone.
    """
    own: Any = config.get("per_layer_config")
    if own is None:
        given = config.get("num_global_key_value_heads") if config.get("attention_k_eq_v") else None
        return config["global_head_dim"], given or config["num_key_value_heads"]
    full, of_layers = {str(i) for i, slides in enumerate(sliding) if not slides}, list(own.values())
    if own and ({*own} != full or any(layer != of_layers[0] for layer in of_layers)):
        raise UserError(
            "config.json: per_layer_config is supported if it is one and the same for the layers of type full_attention alone"
        )
    first = of_layers[0] if own else {}
    if other := sorted({*first} - {"head_dim", "num_key_value_heads"}):
        raise UserError(
            f"config.json: '{other[0][:80]}' of per_layer_config is not supported (head_dim, num_key_value_heads)"
        )
    if "num_key_value_heads" in first and not config.get("attention_k_eq_v"):
        raise UserError(
            "config.json: num_key_value_heads of per_layer_config is not supported without attention_k_eq_v"
        )
    return first.get("head_dim") or config["head_dim"], first.get("num_key_value_heads") or config[
        "num_key_value_heads"
    ]


def write(fields: Mapping[str, Any], full_rope: Config) -> dict[str, Any]:
    """The keys of `config.json` that `read` reads as these fields."""
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "pad_token_id": None,
        "rope_parameters": {
            "full_attention": full_rope,
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": fields["rope_theta_sliding"],
            },
        },
        "final_logit_softcapping": fields["logit_cap"],
        "global_head_dim": fields["full_head_dim"] or fields["head_dim"],
        "num_global_key_value_heads": fields["full_kv_heads"],
        "attention_k_eq_v": fields["keys_as_values"],
        "num_kv_shared_layers": fields["n_sharing"],
        "use_double_wide_mlp": fields["sharing_mlp_size"] is not None,
        "hidden_size_per_layer_input": fields["per_layer_size"],
        "vocab_size_per_layer_input": fields["per_layer_vocab"] or fields["vocab_size"],
    }
