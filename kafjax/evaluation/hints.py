"""Hints on what to look at next, derived from the results. Each names the figure it comes from."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from kafjax.evaluation.error_budget import DISTRACTOR_HARM, RETRIEVAL_MISS
from kafjax.evaluation.results import (
    BASE,
    HEADLINE,
    ORACLE,
    PARAPHRASE,
    RETENTION,
    SEEN,
    headline,
    splits_of,
)


def hints(results: Mapping[str, Any]) -> list[str]:
    """Plain sentences, most important first; empty if nothing stands out."""
    methods = results["methods"]
    qualities = {name: method["quality"] for name, method in methods.items()}
    trained = {name for name, method in methods.items() if method["cost"]["trainable_parameters"]}
    splits = [split for split in splits_of(results) if split != RETENTION]
    return [
        *_experiment(qualities, splits),
        *_training(qualities, trained),
        *_retrieval(results["error_budget"]),
    ]


def _experiment(qualities: Mapping[str, Any], splits: Sequence[str]) -> list[str]:
    found, split = [], headline(splits)
    knows = qualities.get(BASE, {}).get(split)
    if knows and knows["low"] is not None and knows["low"] > 0.05:
        found.append(
            f"{BASE} already answers {knows['value']:.0%} on {split}: part of this corpus is not new to it, "
            "so read the other rows as gains over that."
        )
    reader = qualities.get(ORACLE, {}).get(split)
    if reader and reader["value"] is not None and reader["value"] < 0.85:
        found.append(
            f"{ORACLE} reads the right passage and still answers only {reader['value']:.0%} on {split}: "
            "the prompt or the model limits retrieval, not the index."
        )
    widths = [
        (interval["high"] - interval["low"], split)
        for quality in qualities.values()
        for split in splits
        if (interval := quality.get(split)) and interval["low"] is not None
    ]
    width, widest = max(widths, default=(0.0, ""))
    if width > 0.2:
        found.append(
            f"The widest interval, on {widest}, spans {100 * width:.0f} points: ask more before trusting small differences."
        )
    return found


def _training(qualities: Mapping[str, Any], trained: Collection[str]) -> list[str]:
    lost, distracted, wording, drilled = {}, {}, {}, {}
    for name, quality in qualities.items():
        change = quality.get(f"{RETENTION}_change")
        if change and change["high"] is not None and change["high"] < -0.05:
            (lost if name in trained else distracted)[name] = f"{-100 * change['value']:.0f}"
        if name in trained:
            for easier, harder, gaps in (
                (SEEN, PARAPHRASE, wording),
                (PARAPHRASE, HEADLINE, drilled),
            ):
                a, b = quality.get(easier), quality.get(harder)
                if a and b and None not in (a["low"], b["high"]) and a["low"] > b["high"]:
                    gaps[name] = f"{100 * (a['value'] - b['value']):.0f}"
    found = []
    if drilled:
        found.append(
            f"Points by which subjects with trained questions beat subjects of which only documents were trained: {_listed(drilled)}. "
            f"Most of that came from the questions; read {HEADLINE} for what documents taught."
        )
    if lost:
        remedy = "mix in replay data, lower the learning rate or train for fewer epochs"
        found.append(
            f"Points of what the base model knew that are lost: {_listed(lost)}. To soften it: {remedy}."
        )
    if distracted:
        found.append(
            f"Points by which passages in the prompt spoil what the base model knows: {_listed(distracted)}."
        )
    if wording:
        found.append(
            f"Points by which trained wording beats unseen wording: {_listed(wording)}. Train on more phrasings of each document."
        )
    return found


def _retrieval(budgets: Mapping[str, Any]) -> list[str]:
    advice = {
        RETRIEVAL_MISS: "Retrieve more passages, or cut and embed them differently",
        DISTRACTOR_HARM: "Put fewer or shorter passages in the prompt, or rerank them",
    }
    found = []
    for cause, remedy in advice.items():
        shares = {
            name: budget[cause]
            for name, budget in budgets.items()
            if cause in budget and budget[cause]["n"]
        }
        large = {
            name: f"{share['value']:.0%}"
            for name, share in shares.items()
            if share["low"] is not None and share["low"] > 0.05
        }
        if large:
            found.append(f"Questions lost to {cause}: {_listed(large)}. {remedy}.")
    return found


def _listed(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
