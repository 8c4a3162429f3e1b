"""Ceilings of this machine, measured: products of large matrices, and reading memory. Each
by JAX and by torch in a process of its own; the higher figure counts."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.processes import Job, once
from benchmarks.side import Side

SIZE = 2048
BLOCK_BYTES = 2**30
ROUNDS = 3
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """FLOP/s of products by their type, bytes/s of reading."""

    flops: dict[str, float]
    bandwidth: float

    @property
    def best_dtype(self) -> str:
        """The type whose products are faster here."""
        return max(self.flops, key=self.flops.__getitem__)

    def share(self, dtype: str, seconds: float, facts: dict[str, Any]) -> float | None:
        """The least time that arithmetic and reading need at these rates, over the time taken;
        None where a side told of neither."""
        needed = facts.get("flops", 0) / self.flops[dtype], facts.get("bytes", 0) / self.bandwidth
        return max(needed) / seconds or None


def measure(folder: Path) -> Ceilings:
    """Measures with both libraries, in folders under `folder`."""
    rates = np.max(
        [once(Job(f"benchmarks.ceilings:by_{by}"), folder / by) for by in ("jax", "torch")], axis=0
    )
    return Ceilings(dict(zip(DTYPES, map(float, rates), strict=False)), float(rates[-1]))


def by_jax() -> Side:
    import jax

    matmul, total = jax.jit(lambda a: a @ a), jax.jit(lambda x: x.sum())
    return Side(
        lambda: _rates(
            lambda dtype: jax.numpy.ones((SIZE, SIZE), dtype),
            lambda a: matmul(a).block_until_ready(),
            lambda: jax.numpy.ones(BLOCK_BYTES // 4, "float32"),
            lambda x: total(x).block_until_ready(),
        ),
        {},
    )


def by_torch() -> Side:
    import torch

    from benchmarks.theirs import use_all_cores

    use_all_cores()
    return Side(
        lambda: _rates(
            lambda dtype: torch.ones(SIZE, SIZE, dtype=getattr(torch, dtype)),
            lambda a: a @ a,
            lambda: torch.ones(BLOCK_BYTES // 4),
            lambda x: x.sum(),
        ),
        {},
    )


def _rates(
    matrix: Callable[[str], Any],
    product: Callable[[Any], Any],
    block: Callable[[], Any],
    total: Callable[[Any], Any],
) -> np.ndarray:
    """FLOP/s of products in each of `DTYPES`, then bytes/s of a sum."""
    flops = [2 * SIZE**3 / _least(product, matrix(dtype)) for dtype in DTYPES]
    return np.array([*flops, BLOCK_BYTES / _least(total, block())])


def _least(call: Callable[[Any], Any], argument: Any) -> float:
    """Seconds of the fastest of some calls, behind one that may compile."""
    call(argument)
    taken = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        call(argument)
        taken.append(time.perf_counter() - began)
    return min(taken)
