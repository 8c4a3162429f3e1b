"""Summaries by the number of passages in the prompt: accuracy, recall, tokens and latency at each
depth, as data, tables and a figure.

results = collect(predictions, latencies)      one row a depth, in results.json
tables(results); draw(results, path); draw_places(places, path)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.ticker import PercentFormatter

from kafjax.core.records import Prediction
from kafjax.evaluation.clustered import cells, compare, is_correct, mean
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

Trials = Mapping[int, Sequence[Prediction]]
"""Answers to the same questions by seed."""
NO_GOLD = "none"
"""Place of the gold passage where it is left out."""
COPIES = "copies"
"""Score of a prediction: 1 where its reply stands in a passage (`copies`)."""
FOUND = {"recall_at_k": recall_at_k, "mrr": reciprocal_rank, "ndcg": ndcg}
"""Measures of what was found, by name."""


def collect(
    predictions: Mapping[int, Trials], latencies: Mapping[int, Sequence[Mapping[str, float]]]
) -> dict[str, Any]:
    """Summarises the answers at each depth.

    Args:
      predictions: by depth and seed, of the same questions in the same order.
      latencies: by depth, seconds of each stage of single queries.

    Returns:
      `depths`, a row for each: intervals of `accuracy`, of what was found (None where nothing is
        searched) and of `prompt_tokens`, `n_questions`, `latency_seconds`, and the paired
        comparisons `against_1` and `against_best`; and `best`, the least depth of the highest
        accuracy.
    """
    arms = {k: cells(trials) for k, trials in predictions.items()}
    best = max(arms, key=lambda k: (arms[k].sum_SxC.sum(), -k))
    depths = [
        {
            "k": k,
            "accuracy": mean(arms[k]).to_json(),
            "n_questions": int(arms[k].count_SxC.sum()),
            **{name: _found(trials, measure) for name, measure in FOUND.items()},
            "prompt_tokens": mean(cells(trials, lambda p: p.prompt_tokens)).to_json(),
            "latency_seconds": latency_summary(latencies.get(k, ())),
        }
        for k, trials in predictions.items()
    ]
    for name, reference in (("against_1", 1), ("against_best", best)):
        if reference not in predictions:
            continue
        rows = {k: row for k, row in zip(predictions, depths, strict=True) if k != reference}
        found = compare([(arms[k], arms[reference]) for k in rows])
        for row, one in zip(rows.values(), found, strict=True):
            row[name] = {
                "difference": one.difference.to_json(),
                "p_value": one.p_holm,
                "verdict": one.verdict,
            }
    return {"best": best, "depths": depths}


def copies(reply: str, passages: Sequence[str]) -> bool:
    """True if a reply, whose first line is no refusal, stands in a passage."""
    said = first_line(reply)
    return not abstains(said) and any(contains(passage, [said]) for passage in passages)


def collect_places(predictions: Mapping[tuple[str, str], Trials]) -> list[dict[str, Any]]:
    """Summarises the answers by what stood beside the gold passage and where it stood.

    Args:
      predictions: by distractors, place and seed, of questions that name a gold passage. Their
        scores hold `COPIES`.

    Returns:
      A row for each: intervals of `accuracy`, of `abstains`, and of `copies`, wrong replies that
        stand in a passage.
    """
    measures: dict[str, Callable[[Prediction], float]] = {
        "accuracy": is_correct,
        "abstains": lambda p: float(abstains(p.answer)),
        "copies": lambda p: float(not p.correct) * p.score[COPIES],
    }
    return [
        {
            "distractors": distractors,
            "place": place,
            **{name: mean(cells(trials, of)).to_json() for name, of in measures.items()},
        }
        for (distractors, place), trials in predictions.items()
    ]


def places_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each place of the gold passage among each kind of others, and one without it."""
    return Table(
        "Place of the passage with the answer",
        (
            "others, place",
            f"accuracy % ({rows[0]['accuracy']['n']} subjects)",
            "abstains %",
            "wrong, copied from a passage %",
        ),
        tuple(
            (
                f"{row['distractors']}, {row['place']}",
                *(percent(row[name]) for name in ("accuracy", "abstains", "copies")),
            )
            for row in rows
        ),
        (
            "Near: the other passages are the best that were found and do not hold the answer. Random: any that do not. Contradicting: the "
            "near ones behind one that states another answer in the words of the right passage. Place 1 is the first in the prompt, the last "
            "one is next to the question.",
            "Abstains: the reply is empty, or begins with one of the usual ways to say that the answer is not known. Only a reader that was "
            "trained to is offered that.",
        ),
    )


def _found(trials: Trials, measure: Callable[..., float]) -> dict[str, Any] | None:
    with_gold = {
        seed: [p for p in rows if p.gold_passages and p.passages] for seed, rows in trials.items()
    }
    with_gold = {seed: rows for seed, rows in with_gold.items() if rows}
    if not with_gold:
        return None
    return mean(cells(with_gold, lambda p: measure(p.passages, p.gold_passages))).to_json()


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
    n = rows[0]["n_questions"] if rows else 0
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
                "[low, high]: 95% interval, by a bootstrap over subjects and seeds. Differences are paired; p by flipping whole subjects, "
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


def draw_places(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Accuracy against the place of the gold passage, and without it, a line for each kind of
    others."""
    kinds = list(dict.fromkeys(row["distractors"] for row in rows))
    places = list(dict.fromkeys(row["place"] for row in rows))
    colours = (("#0072b2", "o"), ("#009e73", "D"), ("#d55e00", "s"))
    with matplotlib.rc_context(STYLE):
        figure = new_figure(5.2, 3.6)
        axes = figure.subplots()
        for number_, (kind, (colour, marker)) in enumerate(zip(kinds, colours, strict=False)):
            of_kind = [row for row in rows if row["distractors"] == kind]
            beside = 0.08 * (number_ - (len(kinds) - 1) / 2)
            at = [places.index(row["place"]) + beside for row in of_kind]
            intervals = [row["accuracy"] for row in of_kind]
            with_gold = sum(row["place"] != NO_GOLD for row in of_kind)
            style = {"color": colour, "marker": marker}
            _line(axes, at[:with_gold], intervals[:with_gold], label=kind, **style)
            if with_gold < len(at):  # no place: apart from the line
                _line(axes, at[with_gold:], intervals[with_gold:], linestyle="none", **style)
        axes.set_xticks(range(len(places)), places)
        axes.set_xlabel("place of the passage with the answer")
        axes.set_ylabel("right")
        axes.set_ylim(-0.04, 1.04)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.legend(title="others")
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
