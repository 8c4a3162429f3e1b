"""Hyperparameters of an adapter, and their resolution against a model."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from kafjax.core import patterns, stacks, trees
from kafjax.core.config import Config, option
from kafjax.core.errors import UserError, nearest
from kafjax.ops.linear import LoRAWeight
from kafjax.ops.quantized import QuantizedKernel

PRESETS = {
    "all-linear": r"^(layers/|per_layer/proj/)",
    "attention": r"(q|k|v|o)_proj",
    "mlp": r"(gate|up|down)_proj",
}
"""Names that `Spec.targets` may be, beside a regular expression."""

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
}
"""Fields of a `Spec` that each variant sets, by name; they go together. LoRA+ is the optimizer's
(`TrainConfig.lora_plus`)."""

INITS = ("lora", "pissa", "olora")


@dataclasses.dataclass(frozen=True)
class Spec(Config):
    """A LoRA adapter's hyperparameters (Hu et al. 2021, arXiv:2106.09685).

    A pattern is a regular expression. It matches a kernel if it is found in its path,
    `layers/attn/q_proj/kernel`, and one layer of the kernel if it is found in that layer's path,
    `layers/3/attn/q_proj/kernel` (also where kernels are of several stacks: `core.stacks`).

    Attributes:
      rank: columns of `a` and rows of `b`.
      alpha: the update is `alpha / rank * a @ b`.
      targets: pattern of the kernels and tables of embeddings that get an adapter, or one of
        `PRESETS`.
      layers: numbers of the layers that get one; None for all layers and the parameters outside of
        layers.
      rank_pattern, alpha_pattern: ranks and alphas that differ, by pattern; the first match counts.
      rslora: scale by `alpha / sqrt(rank)` instead (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732).
      dora: train the norm of each output column apart (DoRA, Liu et al. 2024, arXiv:2402.09353).
      init: how `a` and `b` start: lora (`b` zero), pissa (the largest singular values of the
        kernel, Meng et al. 2024, arXiv:2404.02948) or olora (its QR decomposition, Büyükakyüz 2024,
        arXiv:2406.01775). The last two take what the adapter starts as out of the base: see
        `transform.residual`.
      dropout: share of the adapters' inputs that training drops.
      trained: pattern of parameters that are trained in full beside the adapters (PEFT's
        `modules_to_save`); empty for none.
      token_rows: ids of tokens whose rows of the embedding are trained in full (PEFT's
        `trainable_token_indices`).

    Raises:
      UserError: a rank below 1, an alpha not positive and finite, a pattern that is no regular
        expression, ...

    >>> Spec(rank=16, alpha=32, targets="attention", rank_pattern={"q_proj": 8}).dora
    False
    """

    rank: int = option(
        16, "LoRA: rank of the adapter. More rank holds more facts, and costs memory.", least=1
    )
    alpha: float = option(32.0, "LoRA: alpha; the update is scaled by alpha / rank.", above=0)
    targets: str = option(
        r"(q|k|v|o|gate|up|down)_proj",
        f"LoRA: regular expression found in the paths of the kernels to adapt, or {', '.join(PRESETS)}.",
    )
    layers: tuple[int, ...] | None = option(
        None, "LoRA: numbers of the layers to adapt (default: all).", least=0
    )
    rank_pattern: Mapping[str, int] = option(
        {},
        "LoRA: REGEX:RANK, another rank where REGEX is found; may be repeated, the first counts.",
        least=1,
    )
    alpha_pattern: Mapping[str, float] = option({}, "LoRA: REGEX:ALPHA, likewise.", above=0)
    rslora: bool = option(False, "LoRA: scale by alpha / sqrt(rank) instead; for high ranks.")
    dora: bool = option(False, "LoRA: train the length of each kernel's columns apart (DoRA).")
    init: str = option(
        "lora",
        "LoRA: what the adapter starts as; pissa and olora take it out of the kernels.",
        choices=INITS,
        aliases={"default": "lora"},
    )
    dropout: float = option(
        0.0, "LoRA: share of the adapters' inputs that training drops.", least=0, below=1
    )
    trained: str = option(
        "",
        "LoRA: regular expression of parameters to train in full beside the adapters, and save with them.",
        flag="train_also",
    )
    token_rows: tuple[int, ...] = option(
        (),
        "LoRA: ids of tokens whose rows of the embedding are trained in full.",
        least=0,
        added=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        expressions = {"targets": [self.targets], "trained": [self.trained]}
        expressions |= {
            "rank_pattern": [*self.rank_pattern],
            "alpha_pattern": [*self.alpha_pattern],
        }
        for name, pattern in (
            (name, pattern) for name, given in expressions.items() for pattern in given
        ):
            try:
                patterns.check(pattern)
            except UserError as error:
                raise UserError(f"LoRA {name}={error}") from error
        if self.layers == ():
            raise UserError("LoRA layers=(): must be one or more layer numbers, from 0")
        if len({*self.token_rows}) < len(self.token_rows):
            raise UserError(
                f"LoRA token_rows={self.token_rows!r}: must be ids of tokens, each once"
            )

    @property
    def changes_base(self) -> bool:
        """True if the initial adapter must be subtracted from the base."""
        return self.init != "lora"


def variant(names: list[str], **fields: Any) -> Spec:
    """Returns a `Spec` of variants by name, `variant(["rslora", "dora"], rank=8)`. Raises
    `UserError` for an unknown one.

    >>> variant(["rslora", "dora"], rank=8) == Spec(rank=8, rslora=True, dora=True)
    True
    """
    for name in names:
        if name not in VARIANTS:
            raise UserError(f"unknown LoRA variant '{name}'. {nearest(name, VARIANTS)}")
    return Spec(**{key: value for name in names for key, value in VARIANTS[name].items()}, **fields)


def layer_names(path: str, leaf: Any) -> list[str]:
    """Lists the path of each layer of a stacked leaf `[L, in, out]`, in order. An unstacked leaf
    has one path, its own."""
    return _names(path, leaf.shape[:-2])


def targeted(spec: Spec, params: Mapping[str, Any]) -> dict[str, Any]:
    """The kernels that `spec` adapts in at least one layer, `{path: leaf [.., in, out]}` (arrays or
    abstract).

    Raises `UserError` if the targets match no kernel (naming the nearest paths), if a pattern or a
    layer number means none of them, or if a target already carries an adapter.
    """
    return {path: trees.flatten(params)[path] for path in ranks(spec, params)}


def ranks(spec: Spec, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The rank of each adapted kernel, layer by layer: `{path: int [..]}`, `..` being the kernel's
    layer axis where there is one.

    Rank 0 is a layer without an adapter; a kernel without one in any layer is left out. The arrays
    of an adapter are as wide as the widest layer's rank. Beyond a layer's own rank, `a` and `b` are
    both zero, so they have no gradient and stay zero. Raises `UserError` as `targeted` does.

    >>> base = {"layers": {"attn": {"q_proj": {"kernel": np.ones((2, 4, 3), np.float32)}}}}  # two layers, 4 -> 3
    >>> ranks(Spec(rank=2, layers=(1,)), base)
    {'layers/attn/q_proj/kernel': array([0, 2])}
    """
    leaves = trees.flatten(params)
    kernels = {
        path: leaf
        for path, leaf in leaves.items()
        if path.split("/")[-1] in ("kernel", "embedding")
    }
    targets = PRESETS.get(spec.targets, spec.targets)
    found: dict[str, np.ndarray] = {}
    for path, leaf in kernels.items():
        names, numbers = _layers(path, leaf), _numbers(path, leaf) or (None,)
        chosen = [
            _found(targets, path, name) and (spec.layers is None or i in spec.layers)
            for i, name in zip(numbers, names, strict=True)
        ]
        if any(chosen):
            if isinstance(leaf, LoRAWeight):
                raise UserError(f"'{path}' already carries an adapter; merge that one first")
            if isinstance(leaf, QuantizedKernel):
                refuse_extras(
                    spec,
                    _NOT_QUANTISED,
                    f"LoRA {{setting}} does not go with '{path}', which is quantised: {{why}}; use a float base",
                )
            own = [
                _first(spec.rank_pattern, path, name, spec.rank) if yes else 0
                for name, yes in zip(names, chosen, strict=True)
            ]
            found[path] = np.array(own).reshape(leaf.shape[:-2])
    if not found:
        raise UserError(_no_match(spec, leaves, kernels))
    _check_patterns(spec, {path: kernels[path] for path in found})
    return found


def refuse_extras(spec: Spec, reasons: Mapping[str, str], told: str) -> None:
    """Refuses settings by which an adapter is more than a pair of matrices beside its base.

    Args:
      reasons: settings that are refused, with why.
      told: the message, with `{setting}` and `{why}` to be filled in.

    Raises:
      UserError: for the first setting of `reasons` that `spec` uses.
    """
    used = {
        "dora": spec.dora,
        "init": spec.changes_base,
        "dropout": spec.dropout > 0,
        "trained": bool(spec.trained),
        "token_rows": bool(spec.token_rows),
    }
    for name, why in reasons.items():
        if used[name]:
            raise UserError(told.format(setting=f"{name}={getattr(spec, name)!r}", why=why))


_NOT_QUANTISED = {
    "dora": "its norms would need every kernel as floats at each step",
    "init": "what it takes out of the kernel would have to be quantised again",
}


def alphas(spec: Spec, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The alpha of each adapted kernel, layer by layer: `{path: float64 [..]}` as in `ranks`; 0
    where there is no adapter.

    >>> base = {"layers": {"attn": {"q_proj": {"kernel": np.ones((2, 4, 3), np.float32)}}}}  # two layers, 4 -> 3
    >>> alphas(Spec(rank=2, alpha=8, layers=(1,)), base)
    {'layers/attn/q_proj/kernel': array([0., 8.])}
    """
    leaves = trees.flatten(params)

    def of_kernel(path: str, rank: np.ndarray) -> np.ndarray:
        of_layers = [
            _first(spec.alpha_pattern, path, name, spec.alpha)
            for name in _layers(path, leaves[path])
        ]
        return np.where(rank > 0, np.array(of_layers, float).reshape(rank.shape), 0)

    return {path: of_kernel(path, rank) for path, rank in ranks(spec, params).items()}


def scales(spec: Spec, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Scales of `a @ b`, layer by layer: `{path: float32 [..]}` as in `ranks`; 0 where there is no
    adapter.

    >>> base = {"layers": {"attn": {"q_proj": {"kernel": np.ones((2, 4, 3), np.float32)}}}}  # two layers, 4 -> 3
    >>> scales(Spec(rank=2, alpha=8, layers=(1,)), base)
    {'layers/attn/q_proj/kernel': array([0., 4.], dtype=float32)}
    """
    rank = ranks(spec, params)

    def of_kernel(alpha: np.ndarray, rank: np.ndarray) -> np.ndarray:
        return (alpha / np.maximum(np.sqrt(rank) if spec.rslora else rank, 1)).astype(np.float32)

    return {path: of_kernel(alpha, rank[path]) for path, alpha in alphas(spec, params).items()}


def explicit(
    ranks: Mapping[str, np.ndarray],
    alphas: Mapping[str, np.ndarray],
    rank: int,
    alpha: float,
    **fields: Any,
) -> Spec:
    """Returns the spec that has exactly these `ranks` and `alphas`, as the functions of that name
    return them, by patterns per kernel.

    Args:
      rank, alpha: those of most kernels; the others get a pattern.
      fields: the spec's other fields.

    >>> base = {"layers": {"attn": {"q_proj": {"kernel": np.ones((2, 4, 3), np.float32)}}}}  # two layers, 4 -> 3
    >>> spec = Spec(rank=2, alpha=8, rank_pattern={"layers/1/": 1})
    >>> explicit(ranks(spec, base), alphas(spec, base), rank=2, alpha=8).rank_pattern
    {'^layers/1/attn/q_proj/kernel$': 1}
    """

    def own_names(path: str, rank: np.ndarray) -> list[str]:
        return (
            [path]
            if rank.all()
            else [name for name, r in zip(_names(path, rank.shape), rank.flat, strict=True) if r]
        )

    targets = [name for path, rank in ranks.items() for name in own_names(path, rank)]

    def patterns(values: Mapping[str, np.ndarray], default: float) -> dict[str, Any]:
        found = {}
        for path, of_layers in values.items():
            own = {
                name: v
                for name, v, r in zip(
                    _names(path, of_layers.shape), of_layers.flat, ranks[path].flat, strict=True
                )
                if r
            }
            different = {path: next(iter(own.values()))} if len(set(own.values())) == 1 else own
            found |= {
                f"^{name}$": value.item() for name, value in different.items() if value != default
            }
        return found

    return Spec(
        rank=rank,
        alpha=alpha,
        targets=f"^({'|'.join(targets)})$",
        rank_pattern=patterns(ranks, rank),
        alpha_pattern=patterns(alphas, alpha),
        **fields,
    )


def trained(spec: Spec, params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that `spec` trains in full, `{path: leaf}`. Raises `UserError` if there are
    none, or an adapter's kernel is one.

    >>> base = {"q_proj": {"kernel": np.ones((4, 3))}, "final_norm": {"scale": np.ones(4)}}
    >>> list(trained(Spec(trained="norm/scale"), base))
    ['final_norm/scale']
    """
    if not spec.trained:
        return {}
    leaves = trees.flatten(params)
    found = {path: leaf for path, leaf in leaves.items() if patterns.search(spec.trained, path)}
    if not found:
        raise UserError(
            f"LoRA trained={spec.trained!r} matches no parameter; nearest: {_nearest(spec.trained, leaves)}"
        )
    if both := [path for path in ranks(spec, params) if path in found]:
        raise UserError(
            f"'{both[0]}' is both a target of adapters and trained in full (trained={spec.trained!r}); choose one"
        )
    if in_integers := [path for path, leaf in found.items() if isinstance(leaf, QuantizedKernel)]:
        raise UserError(
            f"LoRA trained={spec.trained!r}: '{in_integers[0]}' is quantised and cannot be trained in full; use a float base"
        )
    return found


def token_table(spec: Spec, params: Mapping[str, Any]) -> dict[str, Any]:
    """The embedding of which `spec` trains rows, `{path: leaf [V, D]}`; empty if it trains none.
    Raises `UserError` for a row that is not there, or that is trained otherwise."""
    if not spec.token_rows:
        return {}
    path, leaves = "embed/embedding", trees.flatten(params)
    if path not in leaves:
        raise UserError(f"LoRA token_rows: this model has no '{path}'")
    if (highest := max(spec.token_rows)) >= (n := leaves[path].shape[0]):
        raise UserError(
            f"LoRA token_rows: there is no row {highest}, '{path}' has rows 0 to {n - 1}"
        )
    if path in ranks(spec, params) or path in trained(spec, params):
        raise UserError(
            f"'{path}' is trained as a whole, so token_rows train nothing more; leave them out"
        )
    return {path: leaves[path]}


def count(spec: Spec, params: Mapping[str, Any]) -> int:
    """Counts the parameters that `spec` trains in the model `params` (abstract will do), padding of
    ranks excluded.

    >>> base = {"layers": {"attn": {"q_proj": {"kernel": np.ones((2, 4, 3), np.float32)}}}}  # two layers, 4 -> 3
    >>> count(Spec(rank=2), base)  # 2 layers of rank 2 * (4 + 3)
    28
    """
    leaves, n = trees.flatten(params), 0
    for path, rank in ranks(spec, params).items():
        n_in, n_out = leaves[path].shape[-2:]
        n += int(rank.sum()) * (n_in + n_out) + (int((rank > 0).sum()) * n_out if spec.dora else 0)
    n += sum(len(spec.token_rows) * leaf.shape[-1] for leaf in token_table(spec, params).values())
    return n + sum(math.prod(leaf.shape) for leaf in trained(spec, params).values())


def _names(path: str, stacked: tuple[int, ...]) -> list[str]:
    return [stacks.of_layer(path, i) for i in stacks.numbers(path, *stacked)] if stacked else [path]


def _numbers(path: str, leaf: Any) -> range:
    """Numbers of the layers that lie in a leaf; none in one that is not stacked."""
    names = _layers(path, leaf)
    return range(0) if names == [path] else stacks.numbers(path, len(names))


def _layers(path: str, leaf: Any) -> list[str]:
    return layer_names(path, leaf.base if isinstance(leaf, LoRAWeight) else leaf)


def _found(pattern: str, path: str, layer_name: str) -> bool:
    return bool(patterns.search(pattern, path) or patterns.search(pattern, layer_name))


def _first(given: Mapping[str, Any], path: str, layer_name: str, default: Any) -> Any:
    return next(
        (value for pattern, value in given.items() if _found(pattern, path, layer_name)), default
    )


def _check_patterns(spec: Spec, kernels: Mapping[str, Any]) -> None:
    named = [(path, name) for path, leaf in kernels.items() for name in _layers(path, leaf)]
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(spec, field):
            if not any(_found(pattern, path, name) for path, name in named):
                raise UserError(
                    f"LoRA {field} {pattern!r} is found in no target; nearest: {_nearest(pattern, kernels)}"
                )
    n_layers = 1 + max((_numbers(path, leaf) or range(1))[-1] for path, leaf in kernels.items())
    if spec.layers is not None and (above := [i for i in spec.layers if i >= n_layers]):
        raise UserError(
            f"LoRA layers: there is no layer {above[0]}, the targets have layers 0 to {n_layers - 1}"
        )


def _no_match(spec: Spec, leaves: Mapping[str, Any], kernels: Mapping[str, Any]) -> str:
    targets = PRESETS.get(spec.targets, spec.targets)
    if any(
        _found(targets, path, name)
        for path, leaf in kernels.items()
        for name in _layers(path, leaf)
    ):
        return f"LoRA layers={list(spec.layers or ())} are no layers of the kernels that targets={spec.targets!r} match"
    if others := [
        path for path in leaves if path not in kernels and patterns.search(targets, path)
    ]:
        return f"LoRA targets={spec.targets!r} match no kernel, only '{others[0]}'; adapters go beside kernels: {', '.join(kernels)}"
    return f"LoRA targets={spec.targets!r} match no kernel; nearest: {_nearest(targets, kernels) or 'none, the tree has no kernels'}"


def _nearest(pattern: str, paths: Mapping[str, Any]) -> str:
    def likeness(path: str) -> float:
        return max(
            difflib.SequenceMatcher(None, pattern, part).ratio()
            for part in [path, *path.split("/")[:-1]]
        )

    return ", ".join(sorted(paths, key=likeness, reverse=True)[:3])
