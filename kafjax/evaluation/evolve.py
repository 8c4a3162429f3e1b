"""Summaries of ways to follow knowledge that changes: what they answer after each step, and what
the step cost, as data, tables and a figure.

    results = collect(answers, updates)       answers[way][seed][step], updates[way][seed][step]
    tables(results); draw(results, path)

Questions about one subject stand or fall together, and so do the answers of one seed: intervals
draw subjects and seeds anew (`clustered`).
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from kafjax.core.records import Prediction
from kafjax.evaluation.clustered import cells, compare, is_correct, mean, t_interval
from kafjax.evaluation.figures import METHOD_STYLE, STYLE, new_figure, save_figure
from kafjax.evaluation.intervals import Interval
from kafjax.evaluation.table import NONE, Table, number, percent

NEW, EARLIER, OLD, DELETED = "new", "earlier", "old", "deleted"
STALE, WEIGHED = "stale", "weighed"
"""Scores of a prediction beside those of every other: 1 where a value is told that held before, and
the share of other values of its kind that a deleted one is more likely than."""

Answers = Mapping[str, Mapping[int, Sequence[Sequence[Prediction]]]]
Updates = Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]]


@dataclasses.dataclass(frozen=True)
class Measure:
    """A share of the answers after a step: `score`, over those that `counts`."""

    title: str
    counts: Callable[[Prediction], bool]
    score: Callable[[Prediction], float] = is_correct


MEASURES = {
    "new": Measure("new facts right", lambda p: p.split == NEW),
    "earlier": Measure("facts of earlier steps right", lambda p: p.split == EARLIER),
    "old": Measure("unchanged facts right", lambda p: p.split == OLD),
    "stale": Measure("stale answers", lambda p: STALE in p.score, lambda p: p.score[STALE]),
    "told": Measure("deleted facts told", lambda p: p.split == DELETED),
    "weighed": Measure(
        "deleted value against others, AUC",
        lambda p: WEIGHED in p.score,
        lambda p: p.score[WEIGHED],
    ),
}


def collect(answers: Answers, updates: Updates) -> dict[str, Any]:
    """Summarises each way over all steps, and after each.

    Args:
      answers: predictions by way, seed and step; step 0 is what was known before.
      updates: what each step cost, likewise: `seconds`, `tokens`, `flops`, `bytes_written`, and
        `latencies`, seconds of single queries.

    Returns:
      For each way `overall`: the measures over all steps from 1 on, `forgotten` (the change of the
        unchanged facts since step 0, at the last step), `update` and `until_right`; and `steps`, a
        row for each.
    """
    return {
        name: {
            "overall": _overall(by_seed, updates[name]),
            "steps": [
                {
                    "step": step,
                    **_measured({seed: steps[step] for seed, steps in by_seed.items()}),
                    "update": _cost([of_seed[step] for of_seed in updates[name].values()]),
                }
                for step in range(len(next(iter(by_seed.values()))))
            ],
        }
        for name, by_seed in answers.items()
    }


def _overall(
    by_seed: Mapping[int, Sequence[Sequence[Prediction]]],
    updates: Mapping[int, Sequence[Mapping[str, Any]]],
) -> dict[str, Any]:
    pooled = {
        seed: [
            dataclasses.replace(p, id=f"{step}/{p.id}")
            for step, of_step in enumerate(steps)
            for p in of_step
            if step
        ]
        for seed, steps in by_seed.items()
    }
    costs = [cost for of_seed in updates.values() for cost in of_seed[1:]]
    return {
        **_measured(pooled),
        "forgotten": _forgotten(by_seed).to_json(),
        "update": _cost(costs),
        "until_right": _until_right(by_seed, updates),
    }


def _measured(trials: Mapping[int, Sequence[Prediction]]) -> dict[str, Any]:
    found = {}
    for name, measure in MEASURES.items():
        counted = {seed: [p for p in rows if measure.counts(p)] for seed, rows in trials.items()}
        kept = {seed: rows for seed, rows in counted.items() if rows}
        found[name] = mean(cells(kept, measure.score)).to_json() if kept else None
    return found


def _forgotten(by_seed: Mapping[int, Sequence[Sequence[Prediction]]]) -> Interval:
    """Change of the facts that were never changed, from step 0 to the last step, paired."""
    last = {seed: [p for p in steps[-1] if p.split == OLD] for seed, steps in by_seed.items()}
    last = {seed: rows for seed, rows in last.items() if rows}
    if not last:
        return Interval(None, None, None, 0)
    ids = {seed: {p.id for p in rows} for seed, rows in last.items()}
    first = {seed: [p for p in by_seed[seed][0] if p.id in ids[seed]] for seed in last}
    return compare([(cells(last), cells(first))])[0].difference


def _until_right(
    by_seed: Mapping[int, Sequence[Sequence[Prediction]]],
    updates: Mapping[int, Sequence[Mapping[str, Any]]],
) -> float | None:
    """Median over new facts of the seconds from the change to its right answer; None where most are
    not answered right after their step."""
    seconds = [
        cost["seconds"] + statistics.median(cost["latencies"] or [0.0])
        if p.correct
        else float("inf")
        for seed, steps in by_seed.items()
        for of_step, cost in zip(steps[1:], updates[seed][1:], strict=True)
        for p in of_step
        if p.split == NEW
    ]
    median = statistics.median_high(seconds) if seconds else float("inf")
    return None if median == float("inf") else median


def _cost(costs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        name: t_interval([cost[name] for cost in costs]).to_json()
        for name in ("seconds", "tokens", "flops", "bytes_written")
    }


def tables(results: Mapping[str, Any]) -> list[Table]:
    """A row a way over all steps; then a row a way and step."""
    quality = []
    for name, found in results.items():
        row = found["overall"]
        quality.append(
            (
                name,
                *(percent(row[key]) for key in ("new", "stale", "told")),
                _auc(row["weighed"]),
                percent(row["forgotten"], signed=True),
                number(row["until_right"]),
            )
        )
    counts = next(iter(results.values()))["overall"]
    n = {key: counts[key]["n"] if counts[key] else 0 for key in ("new", "stale", "told")}
    cost = [
        (
            name,
            *_spent(found["overall"]["update"]),
        )
        for name, found in results.items()
    ]
    steps = [
        (
            f"{name}, step {row['step']}",
            *(percent(row[key]) for key in ("new", "earlier", "old", "stale", "told")),
            _auc(row["weighed"]),
            *_spent(row["update"]),
        )
        for name, found in results.items()
        for row in found["steps"]
    ]
    spent = ("update s", "tokens", "TFLOP", "MB written")
    return [
        Table(
            "Following knowledge that changes",
            (
                "way",
                f"new facts right % ({n['new']} subjects)",
                f"stale answers % ({n['stale']})",
                f"deleted told % ({n['told']})",
                "deleted against others, AUC",
                "unchanged facts, points",
                "s until right",
            ),
            tuple(quality),
            (
                "Over all steps. New: added or edited by the step, asked right after it. Stale: an edited fact is answered with a value "
                "that held before. Told: a deleted fact is answered with its value.",
                "AUC: share of other values of its kind that a deleted value is more likely than, as the reply to its question; compare it "
                "with that of base, which never learned it. Unchanged facts: their change from before the first step to the last step.",
                "s until right: median over new facts from the change to the right answer, the update and one query; - where most are not "
                "answered right. [low, high]: 95%, over seeds and subjects.",
            ),
        ),
        Table(
            "Cost of a step",
            ("way", *spent),
            tuple(cost),
            (
                "Means over steps and seeds with Student's 95% interval of the seconds. Tokens: trained on in all passes, or embedded. "
                "Seconds: training with its compilation, embedding and saving the index; saving and loading weights is not counted.",
            ),
        ),
        Table(
            "Step by step",
            (
                "way",
                "new right %",
                "earlier right %",
                "unchanged right %",
                "stale %",
                "deleted told %",
                "AUC",
                *spent,
            ),
            tuple(steps),
        ),
    ]


def _auc(interval: Mapping[str, Any] | None) -> str:
    if interval is None or interval["value"] is None:
        return NONE
    value = f"{interval['value']:.2f}"
    return (
        value
        if interval["low"] is None
        else f"{value} [{interval['low']:.2f}, {interval['high']:.2f}]"
    )


def _spent(update: Mapping[str, Any]) -> tuple[str, ...]:
    seconds = update["seconds"]
    told = number(seconds["value"])
    if seconds["low"] is not None:
        told += f" [{number(max(seconds['low'], 0.0))}, {number(seconds['high'])}]"
    return (
        told,
        number(update["tokens"]["value"]),
        number(update["flops"]["value"] / 1e12),
        number(update["bytes_written"]["value"] / 1e6),
    )


def draw(results: Mapping[str, Any], path: Path) -> Path:
    """Measures after each step with their intervals, and the seconds of all updates so far; a line
    a way."""
    shown = ("new", "old", "stale", "told", "weighed")
    with matplotlib.rc_context(STYLE):
        figure = new_figure(10.5, 5.6)
        panels: list[Axes] = list(figure.subplots(2, 3).flat)
        styles = list(METHOD_STYLE.values())
        for number_, (name, found) in enumerate(results.items()):
            colour, marker = styles[number_ % len(styles)]
            beside = 0.06 * (number_ - (len(results) - 1) / 2)
            rows = found["steps"]
            for panel, key in zip(panels, shown, strict=False):
                points = [(row["step"] + beside, row[key]) for row in rows if row[key] is not None]
                _line(panel, points, color=colour, marker=marker, label=name)
            seconds = np.cumsum([row["update"]["seconds"]["value"] for row in rows])
            steps = [row["step"] for row in rows]
            panels[-1].plot(steps, seconds, color=colour, marker=marker, markersize=4, label=name)
        for panel, key in zip(panels, shown, strict=False):
            panel.set_title(MEASURES[key].title)
            panel.set_ylim(-0.04, 1.04)
            if key != "weighed":
                panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        panels[len(shown) - 1].axhline(0.5, color="#b3b3b3", linewidth=0.8)
        panels[-1].set_title("seconds of all updates so far")
        panels[-1].set_yscale("symlog", linthresh=1.0)
        panels[-1].set_ylim(0, None)
        panels[-1].legend(fontsize=8)
        for panel in panels:
            panel.set_xlabel("step")
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        return save_figure(figure, path)


def _line(axes: Axes, points: Sequence[tuple[float, Mapping[str, Any]]], **style: Any) -> None:
    if not points:
        return
    at, intervals = zip(*points, strict=True)
    error = np.array(
        [
            (0.0, 0.0)
            if one["low"] is None
            else (one["value"] - one["low"], one["high"] - one["value"])
            for one in intervals
        ]
    ).T
    value = [one["value"] for one in intervals]
    axes.errorbar(at, value, yerr=np.maximum(error, 0), markersize=4, elinewidth=0.8, **style)
