"""What to adapt, and by how much."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from typing import Any

from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.ops.linear import LoRAWeight


@dataclasses.dataclass(frozen=True)
class Spec:
    """A LoRA adapter's hyperparameters (Hu et al. 2021, arXiv:2106.09685).

    Attributes:
      rank: columns of `a` and rows of `b`.
      alpha: the update is `alpha / rank * a @ b`.
      targets: regular expression; each kernel in whose path it is found gets an adapter.

    Raises:
      UserError: rank below 1, alpha not positive and finite, targets not a regular expression.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: str = r"(q|k|v|o|gate|up|down)_proj"

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise UserError(f"LoRA rank={self.rank!r}: must be a whole number, 1 or more")
        if not (isinstance(self.alpha, int | float) and math.isfinite(self.alpha) and self.alpha > 0):
            raise UserError(f"LoRA alpha={self.alpha!r}: must be a finite number above 0")
        try:
            re.compile(self.targets)
        except (re.error, TypeError) as error:
            raise UserError(f"LoRA targets={self.targets!r}: not a regular expression ({error})") from error

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def targeted(spec: Spec, params: Mapping[str, Any]) -> dict[str, Any]:
    """The kernels that `spec` adapts, `{path: leaf [.., in, out]}` (arrays or abstract).

    Raises `UserError` if the targets match no kernel (naming the nearest paths), if the rank is above min(in, out) of a
    target, or if a target already carries an adapter.
    """
    leaves = trees.flatten(params)
    kernels = {path: leaf for path, leaf in leaves.items() if path.split("/")[-1] == "kernel"}
    chosen = {path: leaf for path, leaf in kernels.items() if re.search(spec.targets, path)}
    if not chosen:
        raise UserError(_no_match(spec.targets, leaves, kernels))
    for path, leaf in chosen.items():
        if isinstance(leaf, LoRAWeight):
            raise UserError(f"'{path}' already carries an adapter; merge that one first")
        if spec.rank > min(leaf.shape[-2:]):
            raise UserError(f"LoRA rank={spec.rank} is above min(in, out) of '{path}', a kernel {list(leaf.shape[-2:])}")
    return chosen


def _no_match(targets: str, leaves: Mapping[str, Any], kernels: Mapping[str, Any]) -> str:
    if others := [path for path in leaves if path not in kernels and re.search(targets, path)]:
        return f"LoRA targets={targets!r} match no kernel, only '{others[0]}'; adapters go beside kernels: {', '.join(kernels)}"

    def likeness(path: str) -> float:
        return max(difflib.SequenceMatcher(None, targets, part).ratio() for part in path.split("/")[:-1] or [path])

    nearest = sorted(kernels, key=likeness, reverse=True)[:3]
    return f"LoRA targets={targets!r} match no kernel; nearest: {', '.join(nearest) or 'none, the tree has no kernels'}"
