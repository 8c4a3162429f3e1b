"""Translation between `adapter_config.json` of PEFT and the rank and alpha of each module of a
base.

PEFT names modules by their place in the torch model, `model.layers.3.self_attn.q_proj`. A list of
targets matches name suffixes; a string is a regular expression for the whole name. Rank patterns
are regular expressions for a suffix. Parameters trained in full are named by the suffix of their
own name or of a module around them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from kafjax.core import patterns
from kafjax.core.errors import UserError
from kafjax.hub.peft_settings import DEFAULTS, shown

UNTIED = "they are tied in this base: give it a head of its own (tie_word_embeddings false, and lm_head.weight in its file)"


class Names(NamedTuple):
    """The modules and tensors of a base, by the names of the torch model.

    Attributes:
      modules: linear layers and tables, which can have an adapter.
      tensors: all of them.
      embedding: the input's; "" if there is none.
      tied_head: a module that has the embedding's weight as well; "" if there is none.
      beside: tensors of a larger model around this one, which are not computed here.
    """

    modules: list[str]
    tensors: list[str]
    embedding: str
    tied_head: str
    beside: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Resolved:
    """Ranks and alphas by module, and the tensors and rows of the embedding that are trained in
    full. Names are torch's."""

    ranks: dict[str, int]
    alphas: dict[str, float]
    trained: frozenset[str]
    token_rows: tuple[int, ...] = ()


def resolved(config: Mapping[str, Any], base: Names) -> Resolved:
    """Resolves a `completed` config against a base.

    Raises `UserError` for targets or modules to save that are none of it, for a pattern that is no
    regular expression, and for a head that is adapted apart from the embedding that it is tied to,
    or otherwise.
    """

    def of_module(name: str) -> tuple[int, float]:
        rank = _first(config["rank_pattern"], name, config["r"])
        return rank, _first(config["alpha_pattern"], name, config["lora_alpha"])

    own = {name: of_module(name) for name in base.modules if _is_target(config, name)}
    trained = {name for name in base.tensors if _is_saved(config["modules_to_save"], name)}
    if head := base.tied_head:
        of_head = of_module(head)
        if config["ensure_weight_tying"]:  # what one of them has the other one gets
            own |= (
                {base.embedding: of_head}
                if _is_target(config, head) and base.embedding not in own
                else {}
            )
            trained |= (
                {f"{base.embedding}.weight"}
                if _is_saved(config["modules_to_save"], f"{head}.weight")
                else set()
            )
        if _is_target(config, head) and base.embedding not in own:
            raise UserError(f"target_modules adapt '{head}' and not the embedding; {UNTIED}")
        if own.get(base.embedding, of_head) != of_head:
            raise UserError(
                f"rank_pattern and alpha_pattern mean another rank or alpha for '{head}' than for the embedding it is tied to"
            )
    if not own:
        raise UserError(
            f"target_modules={shown(config['target_modules'])} are no modules of this model"
        )
    for name in config["modules_to_save"] or ():
        if not any(
            _is_saved([name], tensor) for tensor in (*base.tensors, *base.beside, f"{head}.weight")
        ):
            raise UserError(f"modules_to_save: {shown(name)} is no module of this model")
    if config["bias"] != "none":
        biased = {name.removesuffix(".bias") for name in base.tensors if name.endswith(".bias")}
        trained |= {
            f"{module}.bias" for module in biased if config["bias"] == "all" or module in own
        }
    ranks, alphas = (
        {name: rank for name, (rank, _) in own.items()},
        {name: float(alpha) for name, (_, alpha) in own.items()},
    )
    return Resolved(
        ranks, alphas, frozenset(trained), _token_rows(config["trainable_token_indices"], base)
    )


def written(
    want: Resolved, base: Names, *, r: int, lora_alpha: float, excluded: str = "", **fields: Any
) -> dict[str, Any]:
    """Writes a config that `resolved` reads as `want`, by the shortest names that do.

    Args:
      excluded: expression for modules that are none of this base, and bear the same short names in
        the torch model.

    Raises `UserError` if there is none: what is trained in full is no whole module.
    """

    def patterns(
        values: Mapping[str, float], default: float, named: Callable[[str], str]
    ) -> dict[str, float]:
        twin = (
            {base.tied_head: values[base.embedding]}
            if base.tied_head and base.embedding in values
            else {}
        )
        return {
            named(name): value for name, value in {**values, **twin}.items() if value != default
        }

    layers = {name: int(found[1]) for name in base.modules if (found := _LAYER.match(name))}
    wanted = sorted({layers[name] for name in want.ranks if name in layers})
    shortest = (_last, _in_layer, str)
    # what is excluded has no adapter, but can be saved
    of_saved_names = (str,) if excluded else shortest
    for bias, of_targets, of_patterns, of_saved in itertools.product(
        ("none", "lora_only", "all"), shortest, shortest, of_saved_names
    ):
        config = {**DEFAULTS, "r": r, "lora_alpha": lora_alpha, "bias": bias, **fields}
        config["exclude_modules"] = excluded or None
        config["target_modules"] = sorted(set(map(of_targets, want.ranks)))
        if of_targets is not str and wanted != sorted(set(layers.values())):
            config["layers_to_transform"] = wanted
        config["rank_pattern"] = patterns(want.ranks, r, of_patterns)
        config["alpha_pattern"] = patterns(want.alphas, lora_alpha, of_patterns)
        config["trainable_token_indices"] = list(want.token_rows) or None
        in_full = {name for name in want.trained if bias == "none" or not name.endswith(".bias")}
        config["modules_to_save"] = (
            sorted({of_saved(name.rpartition(".")[0]) for name in in_full}) or None
        )
        with contextlib.suppress(UserError):  # such names mean something else
            if resolved(config, base) == want:
                return {"peft_type": "LORA", "inference_mode": True, **config}
    raise UserError(
        "PEFT trains whole modules in full, with their biases; trained= takes a part of one"
    )


_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")


def _last(module: str) -> str:
    return module.rpartition(".")[2]


def _in_layer(module: str) -> str:
    return _LAYER.sub("", module, count=1)


def _ends(module: str, names: Iterable[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _is_target(config: Mapping[str, Any], module: str) -> bool:
    targets, excluded = config["target_modules"], config["exclude_modules"] or []
    if (
        patterns.fullmatch(excluded, module)
        if isinstance(excluded, str)
        else _ends(module, excluded)
    ):
        return False
    if any(
        patterns.match(rf"(^|.*\.){name}($|\..*)", module)
        for name in config["modules_to_save"] or ()
    ):
        return False
    if isinstance(targets, str):
        if targets.lower() == "all-linear":
            # all but the head and tables
            return _LAYER.match(module) is not None or module.endswith(
                ".per_layer_model_projection"
            )
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
    found = next(
        (match for expression in expressions if (match := patterns.match(expression, module))), None
    )
    return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)


def _is_saved(names: Iterable[str] | None, tensor: str) -> bool:
    modules = list(itertools.accumulate(tensor.split(".")[:-1], "{}.{}".format))
    return any(module.endswith(name) for name in names or () for module in modules)


def _token_rows(given: list[int] | dict[str, list[int]] | None, base: Names) -> tuple[int, ...]:
    if not isinstance(given, dict):
        return tuple(given or ())
    of_embedding = [ids for name, ids in given.items() if base.embedding.endswith(name)]
    of_head = [
        ids for name, ids in given.items() if base.tied_head and base.tied_head.endswith(name)
    ]
    if not of_embedding or len(of_embedding) + len(of_head) < len(given):
        raise UserError(
            f"trainable_token_indices={shown(given)} are not supported, only those of the input embedding"
        )
    if any(ids != of_embedding[0] for ids in of_head):
        raise UserError(
            f"trainable_token_indices train other rows of the head than of the embedding; {UNTIED}"
        )
    return tuple(of_embedding[0])


def _first(given: Mapping[str, Any], module: str, default: Any) -> Any:
    return next(
        (
            value
            for pattern, value in given.items()
            if patterns.match(rf"(.*\.)?({pattern})$", module)
        ),
        default,
    )
