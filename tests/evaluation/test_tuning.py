"""Trials of a study and its choices: the same effort for every arm, wider where the best lies at an
edge."""

from __future__ import annotations

import itertools
import math

import pytest

from kafjax.evaluation.tuning import MOVES, Tried, at_edge, best, next_rate, next_reading

READING = {"k": 5, "retriever": "dense", "best_last": True}


def rates_tried(peak: float, n: int) -> list[Tried]:
    """Trials of an arm whose right answers fall with the distance of its rate from `peak`."""
    tried: list[Tried] = []
    while len(tried) < n:
        values = next_rate("lr", tried, 1e-3)
        right = 1 - abs(math.log10(values["lr"] / peak)) / 10
        tried.append(Tried(values, right, forgotten=values["lr"] * 100))
    return tried


@pytest.mark.parametrize(
    ("peak", "found", "edge"),
    [(1e-3, 1e-3, False), (1e-2, 1e-2, False), (3e-5, 3.2e-5, True), (1.0, 0.032, True)],
)
def test_rates_are_half_decades_that_widen_towards_the_better_end(peak, found, edge):
    tried = rates_tried(peak, 5)
    rates = sorted(trial.values["lr"] for trial in tried)
    assert len(set(rates)) == 5
    assert all(b / a == pytest.approx(10**0.5, rel=0.03) for a, b in itertools.pairwise(rates))
    assert best(tried).values == {"lr": found} and at_edge("lr", tried, best(tried)) is edge


def test_a_mild_choice_forgets_little_or_least():
    tried = rates_tried(1e-2, 5)
    assert best(tried, 0.15).values == {"lr": 1e-3}
    assert best(tried, 0.0).values == {"lr": 3.2e-4}


def test_reading_changes_one_thing_at_a_time_on_top_of_the_best():
    tried: list[Tried] = []
    while len(tried) < len(MOVES) + 1:
        values = next_reading(tried, READING)
        lexical, k = values["retriever"] == "lexical", values["k"]
        tried.append(
            Tried(values, 0.5 + 0.2 * lexical + 0.1 * (k == 10) + 0.05 * (not values["best_last"]))
        )
    assert tried[0].values == READING
    assert len({tuple(trial.values.items()) for trial in tried}) == len(tried)
    assert best(tried).values == {"k": 10, "retriever": "lexical", "best_last": False}
    with pytest.raises(ValueError, match="7 trials of reading at most"):
        next_reading(tried, READING)
