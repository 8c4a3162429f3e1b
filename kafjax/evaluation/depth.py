"""Summaries by the number of passages in the prompt: accuracy, recall, tokens and latency at each
depth, as data, tables and a figure.

results = collect(predictions, clusters, latencies)      one row a depth, in results.json
tables(results); draw(results, path)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.ticker import PercentFormatter

from kafjax.core.records import Prediction
from kafjax.evaluation.clustered import compare, mean, one_seed
from kafjax.evaluation.cost import OTHER, STAGES, TOTAL, latency_summary
from kafjax.evaluation.figures import STYLE, new_figure, save_figure
from kafjax.evaluation.score import (
    abstains,
    contains,
    first_line,
    ndcg,
    recall_at_k,
    reciprocal_rank,
)
from kafjax.evaluation.table import NONE, Table, number, percent

FOUND = {"recall_at_k": recall_at_k, "mrr": reciprocal_rank, "ndcg": ndcg}
"""Measures of what was found, by name."""


def collect(
    predictions: Mapping[int, Sequence[Prediction]],
    clusters: Mapping[str, str],
    latencies: Mapping[int, Sequence[Mapping[str, float]]],
) -> dict[str, Any]:
    """Summarises the answers at each depth.

    Args:
      predictions: by depth, of the same questions in the same order.
      clusters: the subject of each question, by its id.
      latencies: by depth, seconds of each stage of single queries.

    Returns:
      `depths`, a row for each: intervals of `accuracy`, of what was found (None where nothing is
        searched) and of `prompt_tokens`,
      `latency_seconds`, and the paired comparisons `against_1` and `against_best`; and `best`, the
        least depth of the highest accuracy.
    """
    correct = {k: [float(p.correct) for p in rows] for k, rows in predictions.items()}
    best = max(predictions, key=lambda k: (sum(correct[k]), -k))
    subjects = {k: [clusters[p.id] for p in rows] for k, rows in predictions.items()}
    depths = [
        {
            "k": k,
            "accuracy": mean(one_seed(correct[k], subjects[k])).to_json(),
            **{name: _found(rows, clusters, measure) for name, measure in FOUND.items()},
            "prompt_tokens": mean(one_seed([p.prompt_tokens for p in rows], subjects[k])).to_json(),
            "latency_seconds": latency_summary(latencies.get(k, ())),
        }
        for k, rows in predictions.items()
    ]
    for name, reference in (("against_1", 1), ("against_best", best)):
        if reference not in predictions:
            continue
        arms = {k: one_seed(correct[k], subjects[k]) for k in predictions}
        rows = {k: row for k, row in zip(predictions, depths, strict=True) if k != reference}
        found = compare([(arms[k], arms[reference]) for k in rows])
        for row, one in zip(rows.values(), found, strict=True):
            row[name] = {
                "difference": one.difference.to_json(),
                "p_value": one.p_holm,
                "verdict": one.verdict,
            }
    return {"best": best, "depths": depths}


def collect_places(
    predictions: Mapping[str, Sequence[Prediction]],
    clusters: Mapping[str, str],
    texts: Mapping[str, str],
) -> list[dict[str, Any]]:
    """Summarises the answers by where the gold passage stood.

    Args:
      predictions: by the name of the place, of questions that name a gold passage.
      clusters: the subject of each question, by its id.
      texts: of each passage, by its id.

    Returns:
      A row for each place: intervals of `accuracy`, of `abstains`, and of `copies`, wrong replies
        that stand in a passage.
    """

    def copies(p: Prediction) -> bool:
        reply = first_line(p.answer)
        return (
            not p.correct
            and not abstains(reply)
            and any(contains(texts[id], [reply]) for id in p.passages)
        )

    measures = {
        "accuracy": lambda p: p.correct,
        "abstains": lambda p: abstains(p.answer),
        "copies": copies,
    }

    def share(rows: Sequence[Prediction], of: Callable[[Prediction], bool]) -> dict[str, Any]:
        return mean(
            one_seed([float(of(p)) for p in rows], [clusters[p.id] for p in rows])
        ).to_json()

    return [
        {"place": place, **{name: share(rows, of) for name, of in measures.items()}}
        for place, rows in predictions.items()
    ]


def places_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each place of the gold passage, and one without it."""
    return Table(
        "Place of the passage with the answer",
        (
            "place",
            f"accuracy % (n={rows[0]['accuracy']['n']})",
            "abstains %",
            "wrong, copied from a passage %",
        ),
        tuple(
            (row["place"], *(percent(row[name]) for name in ("accuracy", "abstains", "copies")))
            for row in rows
        ),
        (
            "The other passages are the best that were found and do not hold the answer; place 1 is the first in the prompt, the last one "
            "is next to the question. The prompt does not offer to abstain.",
        ),
    )


def _found(
    rows: Sequence[Prediction], clusters: Mapping[str, str], measure: Any
) -> dict[str, Any] | None:
    with_gold = [p for p in rows if p.gold_passages and p.passages]
    if not with_gold:
        return None
    return mean(
        one_seed(
            [measure(p.passages, p.gold_passages) for p in with_gold],
            [clusters[p.id] for p in with_gold],
        )
    ).to_json()


def tables(results: Mapping[str, Any]) -> list[Table]:
    """Two tables with a row for each depth: what it is good for, and what it costs."""
    rows = results["depths"]
    quality = [
        (
            f"k={row['k']}",
            percent(row["accuracy"]),
            *(percent(row[name]) for name in FOUND),
            _against(row.get("against_1")),
            _against(row.get("against_best")),
        )
        for row in rows
    ]
    n = rows[0]["accuracy"]["n"] if rows else 0
    timed = {stage for row in rows for stage in row["latency_seconds"]}
    stages = [stage for stage in (TOTAL, *STAGES, OTHER) if stage in timed]
    cost = [
        (
            f"k={row['k']}",
            _tokens(row["prompt_tokens"]),
            *(_milliseconds(row["latency_seconds"].get(stage)) for stage in stages),
        )
        for row in rows
    ]
    found = ("recall@k %", "MRR %", "nDCG %")
    headers = (
        "depth",
        f"accuracy % (n={n})",
        *found,
        "against k=1, points",
        f"against the best, k={results['best']}",
    )
    return [
        Table(
            "Depth of retrieval",
            headers,
            tuple(quality),
            (
                "[low, high]: 95% interval, BCa bootstrap over subjects. Differences are paired; p by flipping whole subjects, "
                "adjusted for the rows of the column (Holm).",
            ),
        ),
        Table(
            "Cost of a query by depth",
            ("depth", "prompt tokens", *(f"{stage} ms" for stage in stages)),
            tuple(cost),
            (
                "Prompt tokens and latency are those of a prompt asked by itself, behind cached worked examples. Latency: p50 / p95.",
            ),
        ),
    ]


def _against(comparison: Mapping[str, Any] | None) -> str:
    if comparison is None:
        return NONE
    p = comparison["p_value"]
    return f"{percent(comparison['difference'], signed=True)}, p {'<0.001' if p < 0.001 else f'{p:.2g}'}"


def _tokens(interval: Mapping[str, Any]) -> str:
    value = number(interval["value"])
    return (
        value
        if interval["low"] is None
        else f"{value} [{number(interval['low'])}, {number(interval['high'])}]"
    )


def _milliseconds(seconds: Mapping[str, float] | None) -> str:
    return (
        NONE
        if seconds is None
        else f"{number(1e3 * seconds['p50'])} / {number(1e3 * seconds['p95'])}"
    )


def draw(results: Mapping[str, Any], path: Path) -> Path:
    """Accuracy and recall against k with their intervals, and the tokens of a prompt beside
    them."""
    rows = results["depths"]
    ticks = list(range(len(rows)))
    with matplotlib.rc_context(STYLE):
        figure = new_figure(9.0, 3.6)
        quality, tokens = figure.subplots(1, 2)
        lines = (
            ("accuracy", "accuracy", "#d55e00", "o", -0.05),
            ("recall_at_k", "recall@k", "#009e73", "D", 0.05),
        )
        # side by side, so that intervals that meet stay readable
        for name, label, colour, marker, beside in lines:
            points = [
                (at + beside, row[name])
                for at, row in zip(ticks, rows, strict=True)
                if row[name] is not None
            ]
            if points:
                at, intervals = zip(*points, strict=True)
                _line(quality, at, intervals, color=colour, marker=marker, label=label)
        quality.set_ylim(-0.04, 1.04)
        quality.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        quality.legend()
        _line(tokens, ticks, [row["prompt_tokens"] for row in rows], color="#0072b2", marker="s")
        tokens.set_ylim(0, None)
        tokens.set_ylabel("prompt tokens")
        for axes in (quality, tokens):
            axes.set_xticks(ticks, [str(row["k"]) for row in rows])
            axes.set_xlabel("k, passages in the prompt")
        return save_figure(figure, path)


def _line(
    axes: Any, at: Sequence[float], intervals: Sequence[Mapping[str, Any]], **style: Any
) -> None:
    value = np.array([interval["value"] for interval in intervals])
    bounds = [(interval["low"], interval["high"]) for interval in intervals]
    error = np.array(
        [
            (0, 0) if low is None else (v - low, high - v)
            for v, (low, high) in zip(value, bounds, strict=True)
        ]
    ).T
    axes.errorbar(at, value, yerr=np.maximum(error, 0), markersize=5, elinewidth=1, **style)
