"""LoRA learns less and forgets less (Biderman et al. 2024); what is forgotten, and what is only out
of form.

    python -m experiments.papers.forget --dry_run             the card and the runs, with estimates
    python -m experiments.papers.forget                       all of it at tiny; again goes on where it stopped
    python -m experiments.papers.forget --sabotage=wrong_rate     nothing is learned, so nothing is forgotten
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.configs.compare import Compare
from experiments.configs.paper import FULL, GPU, TINY
from experiments.papers import reproduce
from experiments.papers.card import Card, Sabotage, read_runs
from experiments.papers.drawing import axes_in
from kafjax.core.config import changed
from kafjax.core.records import Prediction
from kafjax.evaluation import clustered
from kafjax.evaluation.arms import Arm, named
from kafjax.evaluation.claims import Pair, at_least, between
from kafjax.evaluation.intervals import Interval
from kafjax.evaluation.results import REALIGNED, RETENTION
from kafjax.evaluation.table import Table
from launch.spec import Sweep, product, zip_

SPLIT = "untrained"
MARGIN = 0.05
SAID, AGAIN = "said", "said_realigned"
FULL_ARM, LOW, HIGH = "method=full,rank=16", "method=lora,rank=16", "method=lora,rank=256"

PUBLISHED = Table(
    "Biderman et al. 2024, Llama 2 7B",
    ("training", "measure", "full", "LoRA"),
    (
        ("code, continued pretraining", "forgetting (mean of three tasks; higher is better)", "0.545", "r=256 0.617"),
        ("code, continued pretraining", "HumanEval", "0.263", "r=256 0.224"),
        ("code, instructions", "HumanEval", "0.498", "r=16 0.358, r=64 0.417, r=256 0.498"),
    ),
    (
        "The paper's own limits: on code instructions rank 256 equals full, and on mathematics full is ahead in both. Alpha is twice the rank.",
    ),
)  # fmt: skip


def sweep(scale: str) -> Sweep:
    """Full fine-tuning and LoRA at a low and a high rank, for as many steps, and seeds."""
    base = changed(Compare(), **_SAME, **_OF_SCALE[scale])
    ranks = zip_(
        rank=[16, 256], alpha=[32.0, 512.0], methods=[("base", "full", "lora"), ("base", "lora")]
    )
    return Sweep(base, product(ranks, seed=range(3)))


_SAME = {"corpus_seed": 0, "controls": 0, "epochs": 12, "latency_queries": 0}
_OF_SCALE = {
    TINY: {"subjects": 24, "attributes": 2, "retention": 32},
    GPU: {"subjects": 400, "dtype": "bfloat16", "retention": 70},
    FULL: {"subjects": 2000, "dtype": "bfloat16", "model": "meta-llama/Llama-2-7b-hf"},
}


def read(folder: Path) -> list[Arm]:
    """Reads the arms with two numbers: the shares of other matters that are said, before and after
    realignment, less those of the base model."""
    arms = read_runs(folder)
    of_base = {
        (arm.settings["rank"], seed): _shares(trial.predictions)
        for arm in arms
        if arm.settings["method"] == "base"
        for seed, trial in arm.trials.items()
    }

    def with_shares(arm: Arm) -> Arm:
        trials = {}
        for seed, trial in arm.trials.items():
            base, own = of_base[arm.settings["rank"], seed], _shares(trial.predictions)
            numbers = {name: own[name] - base[name] for name in (SAID, AGAIN)}
            trials[seed] = dataclasses.replace(trial, numbers=numbers)
        return dataclasses.replace(arm, trials=trials)

    return [with_shares(arm) for arm in arms]


def _shares(predictions: Sequence[Prediction]) -> dict[str, float]:
    asked = [p for p in predictions if p.split == RETENTION]
    return {
        SAID: statistics.mean(p.correct for p in asked),
        AGAIN: statistics.mean(p.score[REALIGNED] for p in asked),
    }


def forgotten(a: str, b: str) -> Callable[[Sequence[Arm]], Interval]:
    """Reads how much more of ordinary prose one arm forgets than another, in nats a token, paired
    by seed."""

    def measured(arms: Sequence[Arm]) -> Interval:
        one, other = (named(arms, name).trials for name in (a, b))
        pairs = [(one[seed].forgotten, other[seed].forgotten) for seed in one if seed in other]
        return clustered.t_interval([x - y for x, y in pairs if x is not None and y is not None])

    return measured


def learned(a: str, b: str) -> Callable[[Sequence[Arm]], Pair]:
    return lambda arms: (named(arms, a).cells(SPLIT), named(arms, b).cells(SPLIT))


def came_back(arms: Sequence[Arm]) -> Interval:
    """Reads the share of other matters that full fine-tuning says again once it is realigned,
    beyond what the base gains by the same examples."""
    trials = named(arms, FULL_ARM).trials.values()
    return clustered.t_interval([trial.numbers[AGAIN] - trial.numbers[SAID] for trial in trials])


CLAIMS = (
    between("full forgets more prose than rank 256 (nats)", forgotten(FULL_ARM, HIGH), 0.0),
    between("rank 256 forgets no less than rank 16 (nats)", forgotten(HIGH, LOW), -MARGIN),
    at_least("full learns no less than rank 16", learned(FULL_ARM, LOW), MARGIN),
    between("ten other examples bring back some of what full no longer says", came_back, 0.0),
)


def figure(arms: Sequence[Arm], path: Path) -> None:
    """Draws what was learned against what was forgotten, a point a training."""
    with axes_in(
        path,
        "forgotten: prose, nats a token more than the base",
        "learned: questions right about people never asked about",
    ) as axes:
        for name in (FULL_ARM, LOW, HIGH):
            arm = named(arms, name)
            points = [
                (trial.forgotten or 0.0, statistics.mean(p.correct for p in trial.predictions if p.split == SPLIT))
                for trial in arm.trials.values()
            ]  # fmt: skip
            axes.plot(*zip(*points, strict=True), "o", label=name)


CARD = Card(
    name="forget",
    papers=(
        "Biderman et al. 2024, LoRA Learns Less and Forgets Less, arXiv:2405.09673",
        "Zheng et al. 2025, Spurious Forgetting in Continual Learning of Language Models, arXiv:2501.13453",
    ),
    claim="For as many steps LoRA learns less than full fine-tuning and forgets less, the lower its rank the less; and much of what seems "
    "forgotten is there, and comes back by a few examples of anything.",
    design={
        TINY: "Gemma 3 270M learns two facts each of 24 invented people in 12 passes, questions about half of them included; learned is "
        "what it answers about the other half, forgotten the cross entropy of prose and 32 questions about countries, also after ten "
        "other questions about countries. Full at rate 1e-4, LoRA at 1e-3 with alpha twice the rank. Three seeds.",
        GPU: "The same with 400 people and four facts, in bfloat16.",
        FULL: "Llama 2 7B with 2,000 people. The paper trains on code and mathematics.",
    },
    expected="Rates are the defaults, not tuned for equal learning, so LoRA at 1e-3 may learn and forget more than full at 1e-4: then "
    "the order of the paper is not shown, or contradicted. That some comes back should hold.",
    published=PUBLISHED,
    sweep=sweep,
    claims=CLAIMS,
    figure=figure,
    read=read,
    sabotages={
        "wrong_rate": Sabotage(
            "all train at 1e-7, so that nothing is learned or forgotten",
            lambda sweep: sweep.override(lr_full=1e-7, lr_lora=1e-7),
            (CLAIMS[0].text, CLAIMS[3].text),
        )
    },
)

if __name__ == "__main__":
    reproduce.main(CARD)
