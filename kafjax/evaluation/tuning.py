"""Equal effort for every arm: which setting a study tries next, and which it chooses, by the questions
about development subjects alone.

    trained    learning rates a half-decade apart: the default, its neighbours, and then beyond the better end, so that
               the range is widened where the best lies at an edge
    reading    one thing changed at a time on top of the best so far: retriever, order of passages, k
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

Values = Mapping[str, Any]
MOVES: tuple[Values, ...] = (
    {"retriever": "lexical"},
    {"retriever": "hybrid"},
    {"k": 10},
    {"best_last": False},
    {"k": 2},
    {"k": 20},
)
"""Changes that a search for settings of reading tries, in this order."""


@dataclasses.dataclass(frozen=True)
class Tried:
    """One trial: its settings by flag, its share of right answers about development subjects, and
    what it forgot of prose in nats a token (None for weights that did not train)."""

    values: Values
    right: float
    forgotten: float | None = None


def next_rate(flag: str, tried: Sequence[Tried], default: float) -> Values:
    """Returns the learning rate to try next."""
    places = {_place(trial.values[flag], default): trial.right for trial in tried}
    for place in (0, -1, 1):
        if place not in places:
            return {flag: _rate(default, place)}
    low, high = min(places), max(places)
    return {flag: _rate(default, low - 1 if places[low] >= places[high] else high + 1)}


def next_reading(tried: Sequence[Tried], default: Values) -> Values:
    """Returns the settings of retrieval to try next. Raises `ValueError` after the last of
    `MOVES`."""
    if not tried:
        return default
    seen = [dict(trial.values) for trial in tried]
    for move in MOVES[len(tried) - 1 :]:
        if (values := {**best(tried).values, **move}) not in seen:
            return values
    raise ValueError(f"there are {len(MOVES) + 1} trials of reading at most")


def best(tried: Sequence[Tried], most_forgotten: float | None = None) -> Tried:
    """Returns the trial with most right answers, the earliest of equal ones. With `most_forgotten`
    those that forget more are passed over; where all do, the one that forgets least is taken."""
    if most_forgotten is None:
        return max(tried, key=lambda trial: trial.right)
    mild = [trial for trial in tried if (trial.forgotten or 0.0) <= most_forgotten]
    return best(mild) if mild else min(tried, key=lambda trial: trial.forgotten or 0.0)


def at_edge(flag: str, tried: Sequence[Tried], chosen: Tried) -> bool:
    """Says whether a better rate may lie beyond those that were tried."""
    rates = [trial.values[flag] for trial in tried]
    return chosen.values[flag] in (min(rates), max(rates))


def _rate(default: float, place: int) -> float:
    return float(f"{default * 10 ** (place / 2):.2g}")


def _place(rate: float, default: float) -> int:
    return round(2 * math.log10(rate / default))
