"""Rotary positions as `config.json` tells them, `rope_scaling` or `rope_parameters` -> fields of a
`DecoderConfig`, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from kafjax.core.errors import UserError
from kafjax.ops.rope import Llama3Stretch, LongRope, Proportional, Stretch, YarnStretch

Config = Mapping[str, Any]

_NEEDED = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
"""Types of scaling that are computed, and the keys without which one of them means nothing."""
_KNOWN = {
    *(
        "rope_type",
        "type",
        "rope_theta",
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
    ),
    *("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
}


def rope_type(rope: Config) -> str:
    return rope.get("rope_type", rope.get("type", "default"))  # older files say "type"


def read_rope(
    config: Config,
    scaling: Config,
    theta: float,
    *,
    allowed: tuple[str, ...] = tuple(_NEEDED),
    whose: str = "",
) -> dict[str, Any]:
    """Reads `scaling`, one of the ropes of `config`, as `rope_theta`, `rope_factor` and
    `rope_stretch`; messages say `whose` it is.

    Raises `UserError` for a type that is not `allowed`, a key that its type needs, and one that
    says what is not computed.
    """
    kind, family = rope_type(scaling), whose or config.get("model_type")
    share = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if kind not in allowed:
        raise UserError(
            f"config.json: rope_type='{kind}' is not supported for {family} ({', '.join(allowed)})"
        )
    if share not in (None, 1.0):
        raise UserError(
            f"config.json: partial_rotary_factor={share!r} is not supported for {family} (only 1.0)"
        )
    if unknown := sorted(
        key
        for key, value in scaling.items()
        if key not in {*_KNOWN, "partial_rotary_factor"} and value is not None
    ):
        raise UserError(
            f"config.json: '{unknown[0][:80]}' of a rotary embedding is not supported for {family}"
        )
    for key in _NEEDED[kind]:
        if key not in scaling:
            raise UserError(f"config.json: rope_type='{kind}' needs a '{key}'")
    original = scaling.get(
        "original_max_position_embeddings", config.get("max_position_embeddings")
    )
    if kind in ("llama3", "yarn") and original is None:
        raise UserError(f"config.json: rope_type='{kind}' needs 'original_max_position_embeddings'")
    stretch: Stretch | None = None
    if kind == "llama3":
        stretch = Llama3Stretch(
            float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"]), int(original)
        )
    if kind == "yarn":
        if theta == 1:
            raise UserError("config.json: rope_type='yarn' needs a rope_theta other than 1")
        slow, fast = (
            float(scaling.get(key) or default)
            for key, default in (("beta_slow", 1), ("beta_fast", 32))
        )
        truncate = scaling.get("truncate", True)
        stretch = YarnStretch(slow, fast, int(original), _attention_factor(scaling), truncate)
    return {
        "rope_theta": float(theta),
        "rope_factor": float(scaling["factor"]) if kind != "default" else 1.0,
        "rope_stretch": stretch,
    }


def _attention_factor(yarn: Config) -> float:
    """Computes what YaRN multiplies queries and keys by, unless the file says it: equation 22, or a
    ratio of two of them."""
    if yarn.get("attention_factor") is not None:
        return float(yarn["attention_factor"])

    def grown(scale: float) -> float:
        return 0.1 * scale * math.log(max(yarn["factor"], 1)) + 1

    scales: tuple[Any, Any] = yarn.get("mscale"), yarn.get("mscale_all_dim")
    return grown(scales[0]) / grown(scales[1]) if all(scales) else grown(1)


def read_long_rope(config: Config, scaling: Config, rotary_dim: int) -> LongRope:
    """Reads LongRoPE, as the Phis have it.

    Raises `UserError` for a key that is missing, and for another number of divisors than of
    frequencies.
    """
    lists = {}
    for key in ("short_factor", "long_factor"):
        value = scaling.get(key)
        if not isinstance(value, list) or not all(
            isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < 1e9 for x in value
        ):
            raise UserError(
                f"config.json: rope_type='longrope' needs a '{key}', a list of numbers above 0"
            )
        if len(value) != rotary_dim // 2:
            raise UserError(
                f"config.json: {key} lists {len(value)} numbers for {rotary_dim // 2} frequencies"
            )
        lists[key] = tuple(map(float, value))
    original, longest = (
        config["original_max_position_embeddings"],
        config["max_position_embeddings"],
    )
    grown = scaling.get("factor") or longest / original
    factor = scaling.get("attention_factor")
    if factor is None:
        factor = math.sqrt(1 + math.log(grown) / math.log(original)) if grown > 1 else 1.0
    return LongRope(lists["short_factor"], lists["long_factor"], original, float(factor), longest)


def read_proportional(config: Config, scaling: Config, theta: Any) -> dict[str, Any]:
    """Reads the rope of Gemma 4's layers that see everything, as `read_rope` does: a share of the
    pairs of a head turns, or all."""
    plain = {
        key: value
        for key, value in scaling.items()
        if key not in ("rope_type", "partial_rotary_factor", "factor")
    }
    if rope_type(scaling) != "proportional":
        return read_rope(
            config,
            scaling,
            theta,
            allowed=("default", "proportional"),
            whose="full_attention layers",
        )
    share, factor = (scaling.get(key, 1.0) for key in ("partial_rotary_factor", "factor"))
    if share is None or share > 1:
        raise UserError(
            f"config.json: partial_rotary_factor={share!r} must be a number above 0, up to 1"
        )
    fields = read_rope(config, plain, theta, allowed=("default",), whose="full_attention layers")
    return fields | {"rope_factor": float(factor), "rope_stretch": Proportional(float(share))}


def written_rope(fields: Config) -> dict[str, Any] | None:
    """The `rope_scaling` that `read_rope` reads as these fields; None where nothing is scaled."""
    stretch, factor = fields["rope_stretch"], fields["rope_factor"]
    if isinstance(stretch, LongRope):
        lists = {"short_factor": list(stretch.short), "long_factor": list(stretch.long)}
        return {"rope_type": "longrope", **lists, "attention_factor": stretch.attention_factor}
    if isinstance(stretch, Proportional):
        return {"rope_type": "proportional", "partial_rotary_factor": stretch.share} | (
            {} if factor == 1 else {"factor": factor}
        )
    if isinstance(stretch, Llama3Stretch):
        own = {
            "rope_type": "llama3",
            "low_freq_factor": stretch.low,
            "high_freq_factor": stretch.high,
        }
    elif isinstance(stretch, YarnStretch):
        own = {
            "rope_type": "yarn",
            "beta_slow": stretch.slow,
            "beta_fast": stretch.fast,
            "truncate": stretch.truncate,
        }
        own["attention_factor"] = stretch.attention_factor
    else:
        return None if factor == 1 else {"rope_type": "linear", "factor": factor}
    return {**own, "factor": factor, "original_max_position_embeddings": stretch.original_length}
