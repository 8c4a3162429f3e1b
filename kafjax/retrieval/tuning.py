"""Chooses how far a tree is searched, by the recall that is asked for.

Nothing is derived: vectors that the tree was built without are searched for, and what is found is
compared with their true neighbours.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable

import numpy as np

from kafjax.core.schema import Count, Share

UP_TO = {10: 100, 100: 400}  # neighbours that are measured, and vectors to score again at first
HELD_OUT = 500  # vectors searched for
_STEP = 0.9  # between numbers of leaves
_CHUNK = 20_000  # vectors scored at once
_TIE = 2e-6  # rounding of a float32 score, as a share of the query's best

Search = Callable[[np.ndarray, int, int, int], tuple[np.ndarray, np.ndarray]]
"""Queries, neighbours, vectors to score again and leaves to look into -> rows and scores
`[Q, K]`, NaN where there are fewer."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """A search for up to `k` neighbours: vectors that are scored again, leaves that are looked
    into, and the recall@k that was measured with them."""

    k: Count
    reorder: Count
    leaves: Count
    recall: Share


def split_rows(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws rows to hold out, a tenth at most. Returns the others and them, both ascending.

    A tree finds the vectors that its centres were computed from more often than new ones: of 20,000
    by 1 point.
    """
    is_held_out = np.zeros(n, bool)
    drawn = np.random.default_rng(0).choice(n, min(HELD_OUT, n // 10), replace=False)
    is_held_out[drawn] = True
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def tune(
    search: Search, vectors_NxD: np.ndarray, queries_QxD: np.ndarray, n_leaves: int, target: float
) -> tuple[Setting, ...]:
    """Finds for each of `UP_TO` the fewest leaves that reach a recall of `target`.

    Reached means by the lower end of a one-sided 95% interval over the queries. Hashing loses
    neighbours wherever the search looks: so many vectors are scored again that with all leaves at
    most half of the loss allowed is left. Where no setting reaches the target, the one that finds
    most is taken.
    """
    n = len(vectors_NxD)
    true_QxK, _ = exact_neighbours(vectors_NxD, queries_QxD, min(max(UP_TO), n))
    counts = _counts(n_leaves)
    settings = []
    for k, first in UP_TO.items():
        if k > n:
            break
        lowest_Qx1 = true_QxK[:, k - 1 : k] - _TIE * np.abs(true_QxK).max(axis=1, keepdims=True)

        def measured(reorder: int, leaves: int, k=k, lowest_Qx1=lowest_Qx1) -> tuple[float, float]:
            """Returns recall, and the lower end of its interval. Which of equal vectors are found
            is the same."""
            recall_Q = (search(queries_QxD, k, reorder, leaves)[1] >= lowest_Qx1).mean(axis=1)
            recall, error = float(recall_Q.mean()), float(recall_Q.std()) / math.sqrt(len(recall_Q))
            return recall, recall - 1.645 * error

        for reorder in (min(n, first * 4**i) for i in range(3)):
            if measured(reorder, n_leaves)[1] >= (1 + target) / 2:
                break
        place = bisect.bisect_left(
            counts, True, key=lambda leaves: measured(reorder, leaves)[1] >= target
        )
        leaves = counts[min(place, len(counts) - 1)]
        settings.append(Setting(k, reorder, leaves, measured(reorder, leaves)[0]))
    return tuple(settings)


def _counts(n_leaves: int) -> list[int]:
    """Numbers of leaves that are tried, ascending.

    >>> _counts(10)
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    """
    shares = [_STEP**i for i in range(1 + math.ceil(math.log(n_leaves) / -math.log(_STEP)))]
    return sorted({math.ceil(n_leaves * share) for share in shares})


def exact_neighbours(
    vectors_NxD: np.ndarray, queries_QxD: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Scores all vectors: the `k` best scores of each query, best first, and their rows, `[Q, K]`."""
    best_QxK = np.zeros((len(queries_QxD), 0), np.float32)
    rows_QxK = np.zeros((len(queries_QxD), 0), np.int64)
    for start in range(0, len(vectors_NxD), _CHUNK):
        scores = queries_QxD @ vectors_NxD[start : start + _CHUNK].T
        found = np.argpartition(-scores, min(k, scores.shape[1]) - 1, axis=1)[:, :k]
        scores = np.concatenate([best_QxK, np.take_along_axis(scores, found, axis=1)], axis=1)
        rows = np.concatenate([rows_QxK, found + start], axis=1)
        kept = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        best_QxK = np.take_along_axis(scores, kept, axis=1)
        rows_QxK = np.take_along_axis(rows, kept, axis=1)
    return best_QxK, rows_QxK
