"""Numbers with their error where questions are not independent: those about one subject stand or fall together.

A cluster is one subject's questions, and what is drawn again is whole clusters. Few clusters give wide intervals, as they should.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from kafjax.evaluation.intervals import CONFIDENCE, Comparison, Interval, bootstrap, paired_difference, sign_flip, wilson


def clustered_mean(values: ArrayLike, clusters: Sequence[Hashable], confidence: float = CONFIDENCE) -> Interval:
    """Mean over N values with a BCa bootstrap over clusters; `n` is the number of values.

    One cluster alone has no bounds. Where all values are one score in [0, 1] a bootstrap sees no variance: the bounds are Wilson's for
    as many observations as there are clusters. Raises `ValueError` for another number of clusters than of values.
    """
    sums_C, counts_C = _sums(values, clusters)
    n = int(counts_C.sum())
    if n == 0:
        return Interval(None, None, None, 0)
    value = float(sums_C.sum() / n)
    if len(sums_C) == 1:
        return Interval(value, None, None, n)
    if np.ptp(sums_C / counts_C) == 0:
        if not 0 <= value <= 1:
            return Interval(value, value, value, n)
        bounds = wilson(value * len(sums_C), len(sums_C), confidence)
        return Interval(value, bounds.low, bounds.high, n)
    return Interval(value, *bootstrap((sums_C, counts_C), _ratio, confidence), n)


def clustered_difference(a: ArrayLike, b: ArrayLike, clusters: Sequence[Hashable], confidence: float = CONFIDENCE) -> Interval:
    """Mean of `a - b` for scores of the same N questions, bootstrapped over clusters.

    Where every cluster has the same difference, the bounds are those of `paired_difference` with a pair for each cluster.
    """
    difference_N = np.asarray(a, float) - np.asarray(b, float)
    sums_C, counts_C = _sums(difference_N, clusters)
    if len(sums_C) > 1 and np.ptp(sums_C / counts_C) == 0:
        mean_C = sums_C / counts_C
        bounds = paired_difference(np.maximum(mean_C, 0), np.maximum(-mean_C, 0), confidence)
        return Interval(float(mean_C[0]), bounds.low, bounds.high, difference_N.size)
    return clustered_mean(difference_N, clusters, confidence)


def clustered_compare(
    a: ArrayLike, b: ArrayLike, clusters: Sequence[Hashable], *, margin: float = 0.05, alpha: float = 0.05
) -> Comparison:
    """Compares scores of the same questions: a permutation test that flips whole clusters, then equivalence within `margin`."""
    difference = clustered_difference(a, b, clusters)
    sums_C, _ = _sums(np.asarray(a, float) - np.asarray(b, float), clusters)
    p_value = sign_flip(sums_C)
    if difference.n and p_value < alpha:
        return Comparison(difference, p_value, "greater" if difference.value > 0 else "less")
    narrow = clustered_difference(a, b, clusters, confidence=1 - 2 * alpha)
    within = narrow.low is not None and -margin < narrow.low and narrow.high < margin
    return Comparison(difference, p_value, "equivalent" if within else "undecided")


def _sums(values: ArrayLike, clusters: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values in each cluster, float64 `[C]` each, clusters in the order in which they first appear."""
    values_N = np.asarray(values, float)
    if values_N.shape != (len(clusters),):
        raise ValueError(f"{values_N.size} values for {len(clusters)} clusters; give one for each")
    place = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    cluster_N = np.array([place[cluster] for cluster in clusters], int)
    sums_C, counts_C = np.zeros(len(place)), np.zeros(len(place))
    np.add.at(sums_C, cluster_N, values_N)
    np.add.at(counts_C, cluster_N, 1.0)
    return sums_C, counts_C


def _ratio(sums_xC: np.ndarray, counts_xC: np.ndarray, axis: int = -1) -> np.ndarray:
    return sums_xC.sum(axis) / counts_xC.sum(axis)
