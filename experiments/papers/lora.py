"""LoRA (Hu et al. 2021): which kernels to adapt, and at what rank.

python -m experiments.papers.lora --dry_run             the card and the runs, with estimates
python -m experiments.papers.lora                       all of it at tiny; again goes on where it stopped
python -m experiments.papers.lora --sabotage=wrong_rate     no claim may be shown
python -m experiments.papers.lora --raw=docs/papers/lora/raw.jsonl.gz     judges committed answers again
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.configs.paper import FULL, GPU, TINY
from experiments.configs.sweep_lora import SweepLora
from experiments.papers import reproduce
from experiments.papers.card import Card, Sabotage
from experiments.papers.drawing import axes_in
from kafjax.core.config import changed
from kafjax.evaluation import clustered
from kafjax.evaluation.arms import Arm, chosen, named
from kafjax.evaluation.claims import Pair, equal, greater
from kafjax.evaluation.table import Table
from launch.spec import Sweep, product

SPLIT = "untrained"
MARGIN = 0.05
Q, QV = "q_proj", "q_proj|v_proj"
RANKS = (1, 2, 4, 8, 64)

PUBLISHED = Table(
    "Hu et al. 2021, GPT-3 175B, accuracy %",
    ("kernels", "task", "r=1", "r=2", "r=4", "r=8", "r=64"),
    (
        ("q", "WikiSQL", "68.8", "69.6", "70.5", "70.4", "70.0"),
        ("q, v", "WikiSQL", "73.4", "73.3", "73.7", "73.8", "73.5"),
        ("q, k, v, o", "WikiSQL", "74.1", "73.7", "74.0", "74.0", "73.9"),
        ("q, v", "MNLI", "91.3", "91.4", "91.3", "91.6", "91.4"),
    ),
    (
        "Table 6. Table 5, at equal parameters on WikiSQL: q, k, v or o alone 70.4, 70.0, 73.0, 73.2; "
        "q, k 71.4; q, v 73.7; q, k, v, o 73.7.",
    ),
)


def sweep(scale: str) -> Sweep:
    """One run, whose lanes are the whole grid: kernels x ranks x rates x seeds."""
    return Sweep(changed(SweepLora(), **_SAME, **_OF_SCALE[scale]), product(corpus=["queries"]))


_SAME = {
    "ranks": RANKS,
    "targets": (QV, Q),
    "lrs": (1e-3, 3e-3),
    "seeds": (0, 1, 2),
    "documents": 1,
    "retention": 0,
    "held_out": 0,
    "epochs": 1,
}
_OF_SCALE = {
    TINY: {"subjects": 40, "attributes": 4},
    GPU: {"subjects": 200, "attributes": 6, "dtype": "bfloat16"},
    FULL: {
        "model": "meta-llama/Llama-3.1-8B",
        "subjects": 400,
        "attributes": 6,
        "dtype": "bfloat16",
    },
}


def at_best_rate(arms: Sequence[Arm]) -> list[Arm]:
    """Keeps each arm at the rate that is best on one half of the tables, and its answers about the
    other half."""
    trained = [arm for arm in arms if arm.settings.get("rank") is not None]
    return chosen(trained, ("lr",))


def pair(targets: str, rank: int, than: str, than_rank: int) -> Callable[[Sequence[Arm]], Pair]:
    """Returns what reads the scores of two arms, each at its best rate."""

    def measured(arms: Sequence[Arm]) -> Pair:
        best = at_best_rate(arms)
        one, other = (
            named(best, f"targets={t},rank={r}").cells(SPLIT)
            for t, r in ((targets, rank), (than, than_rank))
        )
        return one, other

    return measured


CLAIMS = (
    *(
        equal(f"rank {rank} equals rank 4 (q, v)", pair(QV, rank, QV, 4), MARGIN)
        for rank in (8, 64)
    ),
    greater("q, v at rank 4 beat q at rank 8: as many parameters", pair(QV, 4, Q, 8)),
)


def figure(arms: Sequence[Arm], path: Path) -> None:
    """Draws the share of right queries against rank."""
    best = at_best_rate(arms)
    with axes_in(path, "rank", "queries right, unseen tables") as axes:
        for targets, marker in ((QV, "o"), (Q, "s")):
            of_targets = [arm for arm in best if arm.settings["targets"] == targets]
            found = [clustered.mean(arm.cells(SPLIT)) for arm in of_targets]
            value = [one.value or 0.0 for one in found]
            below = [v - (one.low or v) for v, one in zip(value, found, strict=True)]
            above = [(one.high or v) - v for v, one in zip(value, found, strict=True)]
            ranks = [arm.settings["rank"] for arm in of_targets]
            axes.errorbar(ranks, value, yerr=[below, above], marker=marker, label=targets)
        axes.set_xscale("log", base=2)


CARD = Card(
    name="lora",
    papers=(
        "Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685, tables 5 and 6",
    ),
    claim="A small rank is enough: rank 4 does as well as rank 64. At equal parameters it is better to adapt q and v than q alone.",
    design={
        TINY: "Gemma 3 270M learns to write queries about invented tables (a stand-in for WikiSQL): 20 tables trained, 20 others asked, "
        "4 questions each; two rates, three seeds, each arm at the rate that is best on one half of the asked tables and judged on the other.",
        GPU: "The same with 100 tables trained and 100 asked, 6 questions each, in bfloat16.",
        FULL: "Llama 3.1 8B with 200 tables trained and 200 asked. The paper's GPT-3 175B is not public.",
    },
    expected="Rank equality should hold: a form needs few parameters. That q alone is worse may not show: 10 tables judge a difference "
    "of three points in the paper.",
    published=PUBLISHED,
    sweep=sweep,
    claims=CLAIMS,
    figure=figure,
    sabotages={
        "wrong_rate": Sabotage(
            "the rate is that of full fine-tuning or less, 1e-6, so that nothing is learned",
            lambda sweep: sweep.override(lrs=(1e-6, 2e-6)),
            tuple(claim.text for claim in CLAIMS),
        )
    },
)

if __name__ == "__main__":
    reproduce.main(CARD)
