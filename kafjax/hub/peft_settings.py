"""Types and ranges of what an `adapter_config.json` holds, and which fields of PEFT are computed,
checked once where the file is read.

A field falls under one of four heads:

    computed       its type and range are checked, and null is PEFT's default (`DEFAULTS`)
    one value      any other value is refused by name (`_ONLY`)
    ignored        it only says how the adapter was trained or started, or who wrote the file (`_NO_MATTER`)
    any other      refused by name unless it is off: null, false or empty; the same for fields of later releases
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kafjax.core import patterns
from kafjax.core.errors import UserError
from kafjax.core.text import shortened

DEFAULTS: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "target_modules": None,
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "trainable_token_indices": None,
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "init_lora_weights": True,
    "ensure_weight_tying": False,
}
_ONLY = {"peft_type": ("LORA",), "task_type": (None, "CAUSAL_LM", "FEATURE_EXTRACTION")}
_NO_MATTER = {
    "auto_mapping": dict,
    "base_model_name_or_path": str,
    "corda_config": dict,
    "eva_config": dict,
    "fan_in_fan_out": bool,  # of GPT-2's layers; PEFT itself sets it to false for any other
    "inference_mode": bool,
    "loftq_config": dict,
    "lora_ga_config": dict,
    "megatron_core": str,
    "peft_version": str,
    "qalora_group_size": int,
    "revision": str,
    "runtime_config": dict,
    "velora_config": dict,  # another gradient
}
INITS = {"pissa": "pissa", "olora": "olora"} | dict.fromkeys(
    ("gaussian", "orthogonal", "eva", "mica"), "lora"
)
"""How `a` and `b` start, where it can be told again from the base (pissa, olora) or does not matter
once they are trained."""
_OF_ANOTHER_BASE = {"loftq", "corda", "lora_ga"}
_MOST_RANK, _MOST_ALPHA, _MOST_ENTRIES = 2**20, 1e9, 100_000


def completed(config: Any) -> dict[str, Any]:
    """Returns the fields that are computed, completed by PEFT's defaults.

    Raises:
      UserError: naming field and value, for a field that is not computed and not off, another type,
        or a value out of range.
    """
    if not isinstance(config, dict):
        raise UserError("is not a JSON object")
    for name, value in config.items():
        if name in _ONLY:
            if value not in _ONLY[name]:
                raise UserError(
                    f"{name}={shown(value)} is not supported, only {' or '.join(repr(v) for v in _ONLY[name] if v)}"
                )
        elif name in _NO_MATTER:
            if value is not None and not isinstance(value, _NO_MATTER[name]):
                raise UserError(
                    f"{name}={shown(value)} must be {_KINDS[_NO_MATTER[name]]}, or null"
                )
        elif name not in DEFAULTS and value not in (None, False, "", [], {}):
            raise UserError(
                f"field {shown(name)}={shown(value)} is not supported; nothing that changes the result is left out"
            )
    if "peft_type" not in config:
        raise UserError("has no 'peft_type'")
    for name in ("r", "lora_alpha"):
        if config.get(name, 0) is None:
            raise UserError(f"{name}=None must be a number")
    read = {
        name: default if config.get(name) is None else config[name]
        for name, default in DEFAULTS.items()
    }
    _check_numbers(read)
    _check_names(read)
    _check_start(read["init_lora_weights"])
    for name in ("use_rslora", "use_dora", "ensure_weight_tying"):
        if not isinstance(read[name], bool):
            raise UserError(f"{name}={shown(read[name])} must be true or false")
    if read["bias"] not in ("none", "all", "lora_only"):
        raise UserError(
            f"bias={shown(read['bias'])} is not supported, only 'none', 'all' or 'lora_only'"
        )
    if isinstance(read["target_modules"], str) and read["layers_to_transform"] is not None:
        raise UserError("layers_to_transform goes with a list of target_modules only")
    return read


def shown(value: Any) -> str:
    """Shortens a value out of a file for a message."""
    return shortened(value, spelled=ascii)


_KINDS = {dict: "an object", str: "a text", bool: "true or false", int: "a whole number"}


def _check_numbers(read: Mapping[str, Any]) -> None:
    if not _is_number(dropout := read["lora_dropout"]) or not 0 <= dropout < 1:
        raise UserError(f"lora_dropout={shown(dropout)} must be a number from 0 to below 1")
    for name, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        given = [
            (name, read[name]),
            *(
                (f"{pattern}: {shown(key)}", value)
                for key, value in _entries(pattern, read[pattern], dict).items()
            ),
        ]
        for what, value in given:
            if name == "r" and not (_is_count(value, _MOST_RANK) and value):
                raise UserError(
                    f"{what}={shown(value)} must be a whole number from 1 to {_MOST_RANK}"
                )
            if name == "lora_alpha" and not (_is_number(value) and 0 < value <= _MOST_ALPHA):
                raise UserError(
                    f"{what}={shown(value)} must be a number above 0, at most {_MOST_ALPHA:g}"
                )


def _check_names(read: Mapping[str, Any]) -> None:
    if read["target_modules"] is None:
        raise UserError(
            "target_modules=None leaves them to PEFT's own list of families; write them out"
        )
    for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
        value = read[name]
        if isinstance(value, str) and name != "modules_to_save":
            patterns.check(value)
        elif value is not None and not all(
            isinstance(entry, str) for entry in _entries(name, value, list)
        ):
            raise UserError(f"{name}={shown(value)} must be a list of names")
    layers, tokens = read["layers_to_transform"], read["trainable_token_indices"]
    numbers = {"layers_to_transform": [[layers] if isinstance(layers, int) else layers]}
    numbers["trainable_token_indices"] = (
        list(tokens.values()) if isinstance(tokens, dict) else [tokens]
    )
    for name, lists in numbers.items():
        for given in lists:
            if given is not None and not all(_is_count(i) for i in _entries(name, given, list)):
                raise UserError(f"{name}={shown(given)} must be whole numbers from 0")
    for pattern in (*read["rank_pattern"], *read["alpha_pattern"]):
        patterns.check(pattern)


def _check_start(init: Any) -> None:
    if isinstance(init, bool) or (isinstance(init, str) and init in INITS):
        return
    if isinstance(init, str) and init in _OF_ANOTHER_BASE:
        raise UserError(
            f"init_lora_weights='{init}' took something out of the base that cannot be told again; have PEFT make an ordinary adapter of "
            "it: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    raise UserError(
        f"init_lora_weights={shown(init)} is not supported, only True, False, {', '.join(map(repr, INITS))}"
    )


def _entries(name: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise UserError(
            f"{name}={shown(value)} must be {'an object' if kind is dict else 'a list'}"
        )
    if len(value) > _MOST_ENTRIES:
        raise UserError(
            f"{name} has {len(value)} entries; no adapter has more than {_MOST_ENTRIES}"
        )
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any, most: int = 2**31) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most
