"""Fair timing of several sides in one process: turns, and the ratio of medians."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
from tokenizers import Tokenizer

from kafjax.core.progress import Progress
from kafjax.corpus import biographies

T = TypeVar("T")
REST_SECONDS = 0.3  # OpenMP threads spin for 0.2 s after their work


def in_turns(
    label: str,
    sides: Mapping[str, Callable[[], T]],
    rounds: int,
    warmup: int,
    after_first: Callable[[Mapping[str, T]], None] = lambda _: None,
) -> tuple[dict[str, np.ndarray], dict[str, list[T]]]:
    """Calls the sides once a round, every other round backwards, with a rest before each, so that
    no thread pool still spins in another's time.

    Args:
      sides: work by name, done when the call returns.
      after_first: takes the results of the first round; raises if the sides do not do the same.

    Returns the seconds of the rounds behind the warm-up, `[rounds]` a side, and the results of all
    rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    results: dict[str, list[T]] = {name: [] for name in sides}
    with Progress(label, warmup + rounds, unit="round") as bar:
        for round_ in range(warmup + rounds):
            for name in list(sides)[:: 1 if round_ % 2 else -1]:
                time.sleep(REST_SECONDS)
                began = time.perf_counter()
                results[name].append(sides[name]())
                seconds[name].append(time.perf_counter() - began)
            if round_ == 0:
                after_first({name: done[0] for name, done in results.items()})
            bar.advance(
                1, ", ".join(f"{name} {taken[-1]:.2f} s" for name, taken in seconds.items())
            )
    return {name: np.array(taken[warmup:]) for name, taken in seconds.items()}, results


def ratio(ours_R: np.ndarray, theirs_R: np.ndarray) -> dict[str, Any]:
    """Median of theirs over median of ours (above 1, ours is faster), with a bootstrap over the
    rounds that both took part in."""
    drawn_KxR = np.random.default_rng(0).integers(0, len(ours_R), (10_000, len(ours_R)))
    drawn_K = np.median(theirs_R[drawn_KxR], axis=1) / np.median(ours_R[drawn_KxR], axis=1)
    low, high = np.percentile(drawn_K, [2.5, 97.5])
    value = statistics.median(theirs_R) / statistics.median(ours_R)
    return {"value": float(value), "low": float(low), "high": float(high), "n": len(ours_R)}


def sample_tokens(tokenizer: Tokenizer, shape: tuple[int, ...]) -> np.ndarray:
    """Ordinary text, int32 of this shape."""
    texts = (document.text for document in biographies(2 + math.prod(shape) // 128).documents)
    return np.resize(np.array(tokenizer.encode(" ".join(texts)).ids, np.int32), shape)


def listed(values: Mapping[str, Any]) -> str:
    """Settings or versions in a line under a table."""
    return ", ".join(f"{name} {value}" for name, value in values.items())
