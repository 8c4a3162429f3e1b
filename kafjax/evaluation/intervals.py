"""Numbers with their error: 95% intervals, paired differences, tests.

0/1 scores use closed forms that hold for few questions and at 0% and 100%: Wilson's score interval,
Bonett and Price's for paired differences. Everything else is a BCa bootstrap
over questions or texts with a fixed seed, so the same predictions always give the same interval.
Questions are taken as independent draws; `clustered` has what holds for questions that belong
together.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

CONFIDENCE = 0.95
ALPHA = 0.05
MARGIN = 0.05  # differences in accuracy below 5 points count as equal
RESAMPLES = 9999
_SEED = 0
_MAX_RESAMPLED_VALUES = 4_000_000  # held at once, about 32 MB of float64


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate with its interval from `n` observations. With too little data the parts that do
    not exist are None.

    `subjects`: independent draws behind the observations, where several observations are about one
    subject.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    subjects: int | None = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def wilson(successes: float, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Wilson's score interval for a proportion (Wilson 1927). `n = 0` gives no value and no bounds.

    `successes` may be fractional: a sum of scores in [0, 1] varies no more than a 0/1 score of the
    same mean.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie in [0, n], got {successes} of {n}")
    if n == 0:
        return Interval(None, None, None, 0)
    p, z = successes / n, _z(confidence)
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    # At p = 0 and p = 1 one bound is exactly p; the clamp removes the rounding error.
    return Interval(p, min(max(centre - half, 0.0), p), max(min(centre + half, 1.0), p), n)


def mean_score(scores: ArrayLike, confidence: float = CONFIDENCE) -> Interval:
    """Mean of scores in [0, 1], shape [N]: Wilson's interval for 0/1 scores, else a BCa bootstrap.

    Where all scores are the same a bootstrap sees no variance; Wilson's interval at that mean is
    used, which errs to the wide side. Raises `ValueError` on a score that is not in [0, 1].
    """
    scores_N = _scores(scores)
    if scores_N.size == 0 or _binary(scores_N) or np.ptp(scores_N) == 0:
        return wilson(float(scores_N.sum()), scores_N.size, confidence)
    return Interval(
        float(scores_N.mean()), *bootstrap((scores_N,), np.mean, confidence), scores_N.size
    )


def perplexity(nll: ArrayLike, tokens: ArrayLike, confidence: float = CONFIDENCE) -> Interval:
    """Token-weighted perplexity `exp(sum nll / sum tokens)` over N texts, bootstrapped over texts.

    `nll` [N]: summed negative log-likelihood of each text in nats; `tokens` [N]: predicted tokens
    of each. One text alone has a value but no bounds.
    """
    nll_N, tokens_N = np.asarray(nll, float), np.asarray(tokens, float)
    if nll_N.shape != tokens_N.shape or not np.isfinite(nll_N).all() or (tokens_N <= 0).any():
        raise ValueError(
            "each text needs a finite negative log-likelihood and a positive token count"
        )
    if nll_N.size == 0:
        return Interval(None, None, None, 0)

    def log_perplexity(nll_xN: np.ndarray, tokens_xN: np.ndarray, axis: int = -1) -> np.ndarray:
        return nll_xN.sum(axis) / tokens_xN.sum(axis)

    value = math.exp(log_perplexity(nll_N, tokens_N))
    if nll_N.size == 1:
        return Interval(value, None, None, 1)
    if np.ptp(nll_N / tokens_N) == 0:
        return Interval(value, value, value, nll_N.size)
    low, high = bootstrap((nll_N, tokens_N), log_perplexity, confidence)
    return Interval(value, math.exp(low), math.exp(high), nll_N.size)


def perplexity_ratio(
    nll: ArrayLike, nll_base: ArrayLike, tokens: ArrayLike, confidence: float = CONFIDENCE
) -> Interval:
    """Perplexity over the base model's on the same N texts, paired by text. 1 is unchanged, above 1
    is worse."""
    return perplexity(np.asarray(nll, float) - np.asarray(nll_base, float), tokens, confidence)


def paired_difference(a: ArrayLike, b: ArrayLike, confidence: float = CONFIDENCE) -> Interval:
    """Mean of `a - b` for scores in [0, 1] of the same N questions, in [-1, 1].

    0/1 scores: the adjusted Wald interval for paired proportions (Bonett and Price 2012), which
    keeps a width where no pair differs. Fractional scores: a BCa bootstrap over the pairs.
    """
    a_N, b_N = _pair(a, b)
    difference_N = a_N - b_N
    n = difference_N.size
    if n == 0:
        return Interval(None, None, None, 0)
    value = float(difference_N.mean())
    if not (_binary(a_N) and _binary(b_N)) and np.ptp(difference_N) > 0:
        return Interval(value, *bootstrap((difference_N,), np.mean, confidence), n)
    return Interval(value, *paired_bounds(difference_N, confidence), n)


def paired_bounds(difference_N: np.ndarray, confidence: float) -> tuple[float, float]:
    """Bounds of Bonett and Price (2012) for the mean of differences `[N]` in [-1, 1]. Fractions vary
    no more than the -1, 0, 1 of the same sums, for which it is made."""
    n = difference_N.size
    wins = (np.maximum(difference_N, 0).sum() + 1) / (n + 2)
    losses = (np.maximum(-difference_N, 0).sum() + 1) / (n + 2)
    centre = wins - losses
    half = _z(confidence) * math.sqrt((wins + losses - centre**2) / (n + 2))
    return max(float(centre - half), -1.0), min(float(centre + half), 1.0)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979): p-values that keep the chance of any false claim among
    them below alpha."""
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def sign_flip(difference_N: np.ndarray) -> float:
    """Two-sided p-value of a permutation test that flips the signs of differences `[N]`: is their
    mean other than 0?

    All sign patterns up to N = 13, `RESAMPLES` random ones beyond, where the observed pattern
    counts as one more (Phipson and Smyth 2010). scipy's `permutation_test` gives the same, and
    draws the signs anew for each of a table's hundred pairs.
    """
    if difference_N.size < 2 or not difference_N.any():
        return 1.0
    signs_KxN = _signs(difference_N.size)
    sums_K = np.abs(signs_KxN @ difference_N)
    observed = abs(float(difference_N.sum()))
    beyond = int((sums_K >= observed * (1 - 1e-9)).sum())
    exact = len(signs_KxN) == 2**difference_N.size
    return beyond / len(signs_KxN) if exact else (beyond + 1) / (len(signs_KxN) + 1)


@functools.lru_cache(maxsize=4)
def _signs(N: int) -> np.ndarray:
    """Patterns of +-1 [K, N]: all of them where they are no more than `RESAMPLES`, else random
    ones."""
    if 2**N <= RESAMPLES:
        return np.array(list(itertools.product((1.0, -1.0), repeat=N)))
    return np.random.default_rng(_SEED).choice((1.0, -1.0), (RESAMPLES, N))


def bootstrap(
    data: tuple[np.ndarray, ...], statistic: Callable, confidence: float
) -> tuple[float, float]:
    """Bounds of the paired bootstrap: BCa (Efron 1987), or percentile where BCa is undefined (very
    few distinct values)."""
    from scipy import stats

    batch = max(1, _MAX_RESAMPLED_VALUES // data[0].size)
    for method in ("BCa", "percentile"):
        interval = stats.bootstrap(
            data,
            statistic,
            paired=True,
            vectorized=True,
            n_resamples=RESAMPLES,
            batch=batch,
            confidence_level=confidence,
            method=method,
            rng=np.random.default_rng(_SEED),
        ).confidence_interval
        if np.isfinite(interval.low) and np.isfinite(interval.high):
            break
    return float(interval.low), float(interval.high)


def _scores(scores: ArrayLike) -> np.ndarray:
    scores_N = np.asarray(scores, dtype=float)
    if scores_N.ndim != 1 or not ((scores_N >= 0) & (scores_N <= 1)).all():
        raise ValueError("scores must be a flat sequence of numbers in [0, 1]")
    return scores_N


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    a_N, b_N = _scores(a), _scores(b)
    if a_N.shape != b_N.shape:
        raise ValueError(
            f"a paired comparison needs the same questions on both sides, got {a_N.size} and {b_N.size}"
        )
    return a_N, b_N


def _binary(scores_N: np.ndarray) -> bool:
    return bool(np.isin(scores_N, (0.0, 1.0)).all())


def _z(confidence: float) -> float:
    return float(special.ndtri(0.5 + confidence / 2))
