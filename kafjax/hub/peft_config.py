"""What an `adapter_config.json` of PEFT says of each module of a base, and how to say it so.

PEFT names modules by their place in the torch model, `model.layers.3.self_attn.q_proj`. A list of targets is of ends of such names,
a string is an expression for a whole one; patterns of ranks are expressions for an end; what is trained in full is named by the end
of the name of it, or of what it lies in.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from kafjax.core import patterns
from kafjax.core.errors import UserError

_DEFAULTS = {
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
    "use_rslora": False,
    "use_dora": False,
    "init_lora_weights": True,
    "ensure_weight_tying": False,
}
_FIXED = {"peft_type": ("LORA",), "task_type": (None, "CAUSAL_LM", "FEATURE_EXTRACTION"), "bias": ("none",)}
INITS = {"pissa": "pissa", "olora": "olora"} | dict.fromkeys((True, False, "gaussian", "orthogonal"), "lora")
"""How `a` and `b` start, where it can be told again from the base (pissa, olora) or does not matter once they are trained."""
_SILENT = {  # says nothing of the result, or only together with another field that is refused
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "runtime_config"),
    *("megatron_core", "qalora_group_size"),
}


class Names(NamedTuple):
    """What a base is made of, by the names of the torch model.

    Attributes:
      modules: linear layers and tables, which can have an adapter.
      tensors: all of them.
      embedding: the input's; "" if there is none.
      tied_head: a module that has the embedding's weight as well; "" if there is none.
    """

    modules: list[str]
    tensors: list[str]
    embedding: str
    tied_head: str


@dataclasses.dataclass(frozen=True)
class Resolved:
    """Ranks and alphas by module, the tensors that are trained in full, and the rows of the embedding that are; names are torch's."""

    ranks: dict[str, int]
    alphas: dict[str, float]
    trained: frozenset[str]
    token_rows: tuple[int, ...] = ()


def completed(config: Any) -> dict[str, Any]:
    """The fields that are read, with PEFT's defaults. Raises `UserError` naming a field that is not computed, unless it is off."""
    if not isinstance(config, dict):
        raise UserError("is not a JSON object")
    for name, value in config.items():
        if name in _FIXED and value not in _FIXED[name]:
            raise UserError(f"{name}={value!r} is not supported, only {' or '.join(repr(v) for v in _FIXED[name] if v)}")
        if name not in {*_DEFAULTS, *_FIXED, *_SILENT} and value not in (None, False, "", [], {}):
            raise UserError(f"{name}={value!r} is not supported; nothing that changes the result is left out")
    if "peft_type" not in config:
        raise UserError("has no 'peft_type'")
    read = {name: default if config.get(name) is None else config[name] for name, default in _DEFAULTS.items()}
    if isinstance(read["init_lora_weights"], str) and read["init_lora_weights"] not in INITS:
        known = ", ".join(map(repr, INITS))
        raise UserError(f"init_lora_weights={read['init_lora_weights']!r} is not supported, only {known}")
    for name, kind, what in (
        ("target_modules", str | list, "the name of modules, or a list of them"),
        ("exclude_modules", str | list | None, "the name of modules, or a list of them"),
        ("layers_pattern", str | list | None, "a name, or a list of them"),
        ("layers_to_transform", int | list | None, "a number, or a list of them"),
        ("modules_to_save", list | None, "a list of modules"),
        ("trainable_token_indices", list | dict | None, "a list of ids of tokens"),
        ("rank_pattern", dict, "an object"),
        ("alpha_pattern", dict, "an object"),
        *((name, bool, "true or false") for name in ("use_rslora", "use_dora", "ensure_weight_tying")),
    ):
        value = read[name]
        entries = value if isinstance(value, list) else []
        entry = int if name in ("layers_to_transform", "trainable_token_indices") else str
        if not isinstance(value, kind) or not all(isinstance(v, entry) for v in entries):
            raise UserError(f"{name}={value!r} must be {what}")
    if isinstance(read["target_modules"], str) and read["layers_to_transform"] is not None:
        raise UserError("layers_to_transform goes with a list of target_modules only")
    return read


def resolved(config: Mapping[str, Any], base: Names) -> Resolved:
    """What a `completed` config says of a base.

    Raises `UserError` for targets or modules to save that are none of it, for a pattern that is no regular expression, and for a head
    that is scaled otherwise than the embedding that it is tied to.
    """
    of_module = lambda name: (  # noqa: E731
        _first(config["rank_pattern"], name, config["r"]),
        _first(config["alpha_pattern"], name, config["lora_alpha"]),
    )
    try:
        own = {name: of_module(name) for name in base.modules if _is_target(config, name)}
        trained = frozenset(name for name in base.tensors if _is_saved(config["modules_to_save"], name))
        of_head = of_module(base.tied_head)
    except re.error as error:
        raise UserError(f"{error.pattern!r} is not a regular expression ({error})") from error
    if not own:
        raise UserError(f"target_modules={config['target_modules']!r} are no modules of this model")
    if base.tied_head and own.get(base.embedding, of_head) != of_head:
        raise UserError(
            f"rank_pattern and alpha_pattern mean another rank or alpha for '{base.tied_head}' than for the embedding it is tied to"
        )
    for name in config["modules_to_save"] or ():
        if not any(_is_saved([name], tensor) for tensor in base.tensors):
            raise UserError(f"modules_to_save: '{name}' is no module of this model (the head of a tied model is its embedding)")
    ranks, alphas = {name: rank for name, (rank, _) in own.items()}, {name: float(alpha) for name, (_, alpha) in own.items()}
    return Resolved(ranks, alphas, trained, _token_rows(config["trainable_token_indices"], base.embedding))


def written(want: Resolved, base: Names, *, r: int, lora_alpha: float, **fields: Any) -> dict[str, Any]:
    """A config that `resolved` reads as `want`, by the shortest names that do.

    Raises `UserError` if there is none: what is trained in full is no whole module.
    """

    def patterns(values: Mapping[str, float], default: float, named: Callable[[str], str]) -> dict[str, float]:
        twin = {base.tied_head: values[base.embedding]} if base.tied_head and base.embedding in values else {}
        return {named(name): value for name, value in {**values, **twin}.items() if value != default}

    layers = {name: int(found[1]) for name in base.modules if (found := _LAYER.match(name))}
    wanted = sorted({layers[name] for name in want.ranks if name in layers})
    for of_targets, of_patterns, of_saved in itertools.product((_last, _in_layer, str), repeat=3):
        config = {**_DEFAULTS, "r": r, "lora_alpha": lora_alpha, **fields}
        config["target_modules"] = sorted(set(map(of_targets, want.ranks)))
        if of_targets is not str and wanted != sorted(set(layers.values())):
            config["layers_to_transform"] = wanted
        config["rank_pattern"] = patterns(want.ranks, r, of_patterns)
        config["alpha_pattern"] = patterns(want.alphas, lora_alpha, of_patterns)
        config["trainable_token_indices"] = list(want.token_rows) or None
        config["modules_to_save"] = sorted({of_saved(name.rpartition(".")[0]) for name in want.trained}) or None
        if resolved(config, base) == want:
            return {"peft_type": "LORA", "bias": "none", "inference_mode": True, **config}
    raise UserError("PEFT trains whole modules in full, with their biases; trained= takes a part of one")


_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")


def _last(module: str) -> str:
    return module.rpartition(".")[2]


def _in_layer(module: str) -> str:
    return _LAYER.sub("", module, count=1)


def _ends(module: str, names: Iterable[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _is_target(config: Mapping[str, Any], module: str) -> bool:
    targets, excluded = config["target_modules"], config["exclude_modules"] or []
    if patterns.fullmatch(excluded, module) if isinstance(excluded, str) else _ends(module, excluded):
        return False
    if any(patterns.match(rf"(^|.*\.){name}($|\..*)", module) for name in config["modules_to_save"] or ()):
        return False
    if isinstance(targets, str):
        if targets.lower() == "all-linear":
            return _LAYER.match(module) is not None  # all but the head
        return patterns.fullmatch(targets, module) is not None
    if module in targets or not _ends(module, targets):
        return module in targets
    return _is_in_layers(config, module)


def _is_in_layers(config: Mapping[str, Any], module: str) -> bool:
    layers, given = config["layers_to_transform"], config["layers_pattern"] or []
    if layers is None or layers == []:
        return True
    given = [given] if isinstance(given, str) else given
    expressions = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in given] or [_LAYER.pattern]
    found = next((match for expression in expressions if (match := patterns.match(expression, module))), None)
    return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)


def _is_saved(names: Iterable[str] | None, tensor: str) -> bool:
    modules = list(itertools.accumulate(tensor.split(".")[:-1], "{}.{}".format))
    return any(module.endswith(name) for name in names or () for module in modules)


def _token_rows(given: list[int] | dict[str, list[int]] | None, embedding: str) -> tuple[int, ...]:
    if isinstance(given, dict):
        if other := [name for name in given if not embedding.endswith(name)]:
            raise UserError(f"trainable_token_indices of '{other[0]}' are not supported, only those of the input embedding")
        given = next(iter(given.values()), None)
    return tuple(given or ())


def _first(given: Mapping[str, Any], module: str, default: Any) -> Any:
    return next((value for pattern, value in given.items() if patterns.match(rf"(.*\.)?({pattern})$", module)), default)
