"""Adapters of modules that hold several projections of ours: `qkv_proj` in the Phis is our
`q_proj`, `k_proj` and `v_proj`.

    there                             here
    qkv_proj.lora_A  [r, in]          q_proj, k_proj and v_proj: the same `a`
    qkv_proj.lora_B  [q + k + v, r]   their rows of it
    magnitudes, weights               their rows of them

The other way the parts may have come to differ: then the joined adapter has the sum of their ranks,
every part's `a` below the last one's, and `b` in blocks. It computes the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

import numpy as np

from kafjax.core.errors import UserError
from kafjax.hub.names import Part
from kafjax.hub.peft_config import Resolved

Joined = Mapping[str, tuple[Part, ...]]
"""Tensors of the torch model that hold several of ours, by name: the parts, in order."""
Tensors = dict[str, np.ndarray]


def split(
    described: Resolved, tensors: Tensors, joined: Joined, prefix: str, source: str
) -> tuple[Resolved, Tensors]:
    """Splits what PEFT says and stores of joined modules among their parts. `prefix` stands before
    each name.

    Raises `UserError` for a tensor whose rows are not those of the parts together.
    """
    ranks, alphas, trained, tensors = (
        dict(described.ranks),
        dict(described.alphas),
        set(described.trained),
        dict(tensors),
    )
    for whole, parts in joined.items():
        module, _, kind = whole.rpartition(".")
        if kind == "weight" and module in ranks:
            rank, alpha = ranks.pop(module), alphas.pop(module)
            ranks |= {_module(part): rank for part in parts}
            alphas |= {_module(part): alpha for part in parts}
        if whole in trained:
            trained = trained - {whole} | {part.name for part in parts}
        for ending in (
            (kind, "lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
            if kind == "weight"
            else (kind,)
        ):
            name = f"{prefix}{module}.{ending}"
            if (array := tensors.pop(name, None)) is None:
                continue
            if ending != "lora_A.weight" and array.shape[:1] != (parts[-1].stop,):
                raise UserError(
                    f"{source}: tensor '{name}' has shape {list(array.shape)}, this base asks for {parts[-1].stop} rows"
                )
            for part in parts:
                rows = array if ending == "lora_A.weight" else array[part.start : part.stop]
                tensors[f"{prefix}{_module(part)}.{ending}"] = rows
    return dataclasses.replace(
        described, ranks=ranks, alphas=alphas, trained=frozenset(trained)
    ), tensors


def join(
    described: Resolved, tensors: Tensors, joined: Joined, prefix: str, *, rslora: bool
) -> tuple[Resolved, Tensors]:
    """The way back of `split`.

    Raises `UserError` where PEFT has no form: parts of which some only are trained in full, or have
    DoRA's magnitudes.
    """
    ranks, alphas, trained, tensors = (
        dict(described.ranks),
        dict(described.alphas),
        set(described.trained),
        dict(tensors),
    )
    for whole, parts in joined.items():
        module = whole.rpartition(".")[0]
        if in_full := trained & {part.name for part in parts}:
            if len(in_full) < len(parts):
                raise UserError(
                    f"PEFT trains whole modules in full; trained= takes a part of '{module}'"
                )
            trained = trained - in_full | {whole}
            tensors[f"{prefix}{whole}"] = np.concatenate(
                [tensors.pop(f"{prefix}{part.name}") for part in parts]
            )
        if not (
            own := [part for part in parts if whole.endswith(".weight") and _module(part) in ranks]
        ):
            continue
        a = [tensors.pop(f"{prefix}{_module(part)}.lora_A.weight") for part in own]
        b = [tensors.pop(f"{prefix}{_module(part)}.lora_B.weight") for part in own]
        of_parts = [(ranks.pop(_module(part)), alphas.pop(_module(part))) for part in own]
        magnitudes = [
            tensors.pop(name)
            for part in own
            if (name := f"{prefix}{_module(part)}.lora_magnitude_vector") in tensors
        ]
        if magnitudes and len(own) < len(parts):
            raise UserError(
                f"DoRA of a part of '{module}' is not supported by PEFT: adapt all of its parts or none"
            )
        ranks[module], alphas[module], joined_a, joined_b = _one(a, b, of_parts, own, parts, rslora)
        tensors[f"{prefix}{module}.lora_A.weight"], tensors[f"{prefix}{module}.lora_B.weight"] = (
            joined_a,
            joined_b,
        )
        if magnitudes:
            tensors[f"{prefix}{module}.lora_magnitude_vector"] = np.concatenate(magnitudes)
    return dataclasses.replace(
        described, ranks=ranks, alphas=alphas, trained=frozenset(trained)
    ), tensors


def _one(
    a: list[np.ndarray],
    b: list[np.ndarray],
    of_parts: list[tuple[int, float]],
    own: list[Part],
    parts: tuple[Part, ...],
    rslora: bool,
) -> tuple[int, float, np.ndarray, np.ndarray]:
    """Rank, alpha, A and B of the module that holds `parts`, of which `own` have an adapter of
    these ranks and alphas."""
    if (
        len(own) == len(parts)
        and len(set(of_parts)) == 1
        and all(np.array_equal(other, a[0]) for other in a)
    ):
        return *of_parts[0], a[0], np.concatenate(b)
    root = math.sqrt if rslora else float
    scales = [alpha / root(rank) for rank, alpha in of_parts]
    rank = sum(rank for rank, _ in of_parts)
    joined_b = np.zeros((parts[-1].stop, rank), np.float32)
    for part, rows, scale, columns in zip(
        own, b, scales, _spans(rank for rank, _ in of_parts), strict=True
    ):
        joined_b[part.start : part.stop, columns] = rows * np.float32(scale / scales[0])
    return rank, scales[0] * root(rank), np.concatenate(a), joined_b


def _spans(lengths: Iterator[int]) -> Iterator[slice]:
    start = 0
    for n in lengths:
        yield slice(start, start + n)
        start += n


def _module(part: Part) -> str:
    return part.name.rpartition(".")[0]
