"""Fields of a `DecoderConfig` that many families read from `config.json` in the same way. What is
not computed is refused by its name."""

from __future__ import annotations

from typing import Any

from kafjax.core.errors import UserError
from kafjax.models.ropes import Config, read_rope

DENSE = {"num_experts": None, "num_local_experts": None}
UNCAPPED = {"final_logit_softcapping": None, "attn_logit_softcapping": None}
_PLAIN: dict[str, Any] = {
    "norm_offset": 0.0,
    "post_norms": False,
    "qk_norm": False,
    "activation": "silu",
    "scale_embedding": False,
    "rope_theta_sliding": None,
}


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


def plain_fields(config: Config, *, max_length: int) -> dict[str, Any]:
    """Reads the fields that all but the Gemmas share; `max_length` is the default of a file that
    has none."""
    refuse(config, {"hidden_act": "silu", **UNCAPPED, **DENSE})
    config = {"max_position_embeddings": max_length, **config}
    hidden_size, n_heads = count(config, "hidden_size"), count(config, "num_attention_heads")
    if config.get("head_dim") is None and hidden_size % n_heads:
        raise UserError(
            f"config.json: no head_dim, and hidden_size={hidden_size} is no multiple of num_attention_heads={n_heads}"
        )
    head_dim = count({"head_dim": hidden_size // n_heads, **without_nulls(config)}, "head_dim")
    return {
        **shape_fields({"num_key_value_heads": n_heads, **without_nulls(config)}, head_dim),
        **rope_fields(config, 1e4),
        **_PLAIN,
        "sliding": (False,) * count(config, "num_hidden_layers"),
        "window": None,
        "family": config["model_type"],
        "attention_scale": head_dim**-0.5,
        "tied": config.get("tie_word_embeddings", False),
        "max_length": config["max_position_embeddings"],
        "bos_id": config.get("bos_token_id", 1),
        **end_fields({"eos_token_id": 2, **config}),
    }


def rope_fields(config: Config, theta: float) -> dict[str, Any]:
    """Reads the one rope of all layers; `theta` where the file has none."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if nested := {"full_attention", "sliding_attention"} & set(scaling):
        family = config["model_type"]
        raise UserError(
            f"config.json: rope_parameters by kind of layer ({min(nested)}) are not supported for {family}"
        )
    return read_rope(config, scaling, scaling.get("rope_theta", config.get("rope_theta", theta)))


def ropes_by_kind(config: Config) -> tuple[Config, Config]:
    """Finds the ropes of full and of sliding layers. Raises `UserError` where sliding ones are
    scaled."""
    ropes = config.get("rope_parameters") or {}
    full, local = ropes.get("full_attention") or {}, ropes.get("sliding_attention") or {}
    read_rope(config, local, 1.0, allowed=("default",), whose="sliding_attention layers")
    return full, local


def without_nulls(config: Config) -> Config:
    """Leaves out the keys that a file gives as null, so that their defaults hold."""
    return {key: value for key, value in config.items() if value is not None}


def shape_fields(config: Config, head_dim: int) -> dict[str, Any]:
    """Reads the sizes. Raises `UserError` where queries do not divide over keys and values."""
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


def window_fields(config: Config, window: int | None, sliding: list[bool]) -> dict[str, Any]:
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


def end_fields(config: Config) -> dict[str, Any]:
    """Reads the tokens that end a text; a file names one, several or none. The first one ends a
    text that is trained on, each one a reply."""
    given, vocab_size = config.get("eos_token_id"), count(config, "vocab_size")
    if given is None or given == []:
        return {"eos_id": None, "also_eos_ids": ()}
    ids = given if isinstance(given, list) else [given]
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocab_size for i in ids):
        raise UserError(
            f"config.json: eos_token_id={given!r} must be tokens of the vocabulary of {vocab_size}"
        )
    return {"eos_id": ids[0], "also_eos_ids": tuple(ids[1:])}


def expert_fields(config: Config, *, n_experts: int, k: int, normalised: bool) -> dict[str, Any]:
    """Reads how many experts there are and how many a token goes through, by default `n_experts`
    and `k`."""
    named = next((key for key in DENSE if config.get(key) is not None), "num_experts")
    total = count({named: n_experts, **without_nulls(config)}, named)
    chosen = count({"num_experts_per_tok": k, **config}, "num_experts_per_tok")
    if chosen > total:
        raise UserError(f"config.json: num_experts_per_tok={chosen} is above {named}={total}")
    return {"n_experts": total, "experts_per_token": chosen, "normalised_shares": normalised}
