"""The grid of `sweep_lora`: every combination of its ranks, alphas, rates, targets and seeds is a
lane."""

from __future__ import annotations

import itertools
import re

from experiments.configs.sweep_lora import SweepLora
from kafjax import lora
from kafjax.core.errors import UserError
from kafjax.training.lane import Lane


def grid(config: SweepLora) -> list[Lane]:
    """Lists every combination of the grid. Raises `UserError` for an empty one or a value that is
    none."""
    for name in ("ranks", "alphas", "lrs", "seeds", "targets"):
        if not getattr(config, name):
            raise UserError(f"--{name} is empty: the grid has no lane; give at least one value")
    lanes = []
    targets = list(dict.fromkeys(config.targets))
    axes = config.ranks, config.alphas, config.lrs, enumerate(targets), config.seeds
    for rank, alpha, rate, (t, target), seed in itertools.product(*axes):
        spec = lora.Spec(rank, _alpha(alpha, rank), target, rslora=config.rslora)
        name = (
            f"r{rank}-a{spec.alpha:g}-lr{rate:g}"
            + (f"-{_plain(target)}{t}" if len(targets) > 1 else "")
            + f"-s{seed}"
        )
        lanes.append(Lane(name, spec, rate, seed))
    # 2r and 8 are the same alpha at rank 4
    return list({lane.name: lane for lane in lanes}.values())


def _plain(target: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", target).strip("_")[:20]


def _alpha(text: str, rank: int) -> float:
    try:
        return float(text.removesuffix("r") or "1") * (rank if text.endswith("r") else 1)
    except ValueError:
        raise UserError(
            f"--alphas: '{text[:60]}' is not a number; write 32, or 2r for twice the rank"
        ) from None
