"""Recall of approximate search (TPU-KNN, ScaNN, SOAR).

python -m experiments.papers.recall --dry_run             the card and the runs
python -m experiments.papers.recall                       all of it at tiny: minutes
python -m experiments.papers.recall --sabotage=more_neighbours     more than the formulas are told of
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.configs.paper import FULL, GPU, TINY
from experiments.configs.search_recall import SearchRecall
from experiments.papers import reproduce
from experiments.papers.card import Card, Sabotage
from experiments.papers.drawing import axes_in
from experiments.search_recall import FOUND
from kafjax.core.config import changed
from kafjax.core.records import Prediction
from kafjax.core.rundir import read_object
from kafjax.evaluation import clustered
from kafjax.evaluation.arms import Arm, Trial, arms_of, named
from kafjax.evaluation.claims import Pair, at_least, between, equal
from kafjax.evaluation.intervals import Interval
from kafjax.evaluation.table import Table
from launch.spec import Sweep, chain, product

K = 10
QUERIES = 500
BINS = (32, 128, 512)
TARGETS = (0.5, 0.8, 0.9, 0.95, 0.99)
GROWN = 0.1
SPLIT = "neighbours"
MARGIN, GROWN_MARGIN = 0.01, 0.02
RATE = "queries_per_second"

PUBLISHED = Table(
    "Chern et al. 2022: recall of M bins for K neighbours",
    ("quantity", "formula"),
    (
        ("at least", "(1 - 1/M)^(K - 1)"),
        ("expected", "M/K (1 - (1 - 1/M)^K)"),
    ),
    (
        "Guo et al. 2020 and Sun et al. 2023 show curves of recall against speed on data that are not in a package.",
    ),
)


def sweep(scale: str) -> Sweep:
    """Bins and ScaNN's targets, a tree that has grown, and seeds of the vectors."""
    base = changed(SearchRecall(), k=K, queries=QUERIES, **_OF_SCALE[scale])
    grids = chain(
        product(how=["bins"], bins=BINS),
        product(how=["scann"], recall=TARGETS),
        product(how=["scann"], recall=[0.95], grown=[GROWN]),
    )
    return Sweep(base, product(grids, seed=range(3)))


_OF_SCALE = {
    TINY: {},
    GPU: {"vectors": 200_000},
    FULL: {"vectors": 1_000_000, "dimension": 128},
}


def read(folder: Path) -> list[Arm]:
    """Reads a neighbour of a query as a question about it, which is right if it was found."""
    trials = []
    for file in sorted(folder.glob(f"*/{FOUND}")):
        config, found = read_object(file.with_name("config.json")), read_object(file)
        is_bins = config["how"] == "bins"
        settings = {
            "how": config["how"],
            "bins": config["bins"] if is_bins else 0,
            "target": 0.0 if is_bins else config["recall"],
            "grown": config["grown"],
        }
        predictions = [
            Prediction(
                f"{query}/{rank}", config["how"], SPLIT, "", "", (),
                subject=f"query {query}", correct=rank < hits,
            )
            for query, hits in enumerate(found["hits"])
            for rank in range(config["k"])
        ]  # fmt: skip
        numbers = {RATE: found[RATE]}
        trials.append(
            Trial(settings, config["seed"], predictions, None, "papers", file, numbers=numbers)
        )
    return arms_of(trials)


def of_bins(arms: Sequence[Arm], bins: int) -> Arm:
    return named(arms, f"how=bins,bins={bins}")


def of_target(arms: Sequence[Arm], target: float, grown: float = 0.0) -> Arm:
    return named(arms, f"how=scann,target={target:g},grown={grown:g}")


def expected(bins: int) -> float:
    """Recall that bins are expected to have."""
    return bins / K * (1 - (1 - 1 / bins) ** K)


def least(bins: int) -> float:
    """Recall that bins have at least, on average."""
    return (1 - 1 / bins) ** (K - 1)


def above(bins: int, value: float) -> Callable[[Sequence[Arm]], Interval]:
    """Reads how far a measured recall is above a value, with the interval over queries."""

    def measured(arms: Sequence[Arm]) -> Interval:
        found = clustered.mean(of_bins(arms, bins).cells(SPLIT))
        bounds = (None if x is None else x - value for x in (found.value, found.low, found.high))
        return Interval(*bounds, found.n)

    return measured


def slack(bins: int) -> float:
    """Three standard errors of a recall over the queries of three seeds."""
    return 3 * math.sqrt(expected(bins) * (1 - expected(bins)) / (3 * QUERIES * K))


def targets(one: float, than: float) -> Callable[[Sequence[Arm]], Pair]:
    return lambda arms: (of_target(arms, one).cells(SPLIT), of_target(arms, than).cells(SPLIT))


def grown_and_rebuilt(arms: Sequence[Arm]) -> Pair:
    return of_target(arms, 0.95, GROWN).cells(SPLIT), of_target(arms, 0.95).cells(SPLIT)


def speed_of_less(arms: Sequence[Arm]) -> Interval:
    """Reads the speed at the lowest target over that at the highest, paired by seed."""
    low, high = of_target(arms, TARGETS[0]).trials, of_target(arms, TARGETS[-1]).trials
    return clustered.t_interval([low[s].numbers[RATE] / high[s].numbers[RATE] for s in low])


CLAIMS = (
    *(
        between(
            f"{bins} bins: recall is not below the bound {least(bins):.4f} by three standard errors",
            above(bins, least(bins)),
            -slack(bins),
        )
        for bins in BINS
    ),
    *(
        between(
            f"{bins} bins: recall is the expected {expected(bins):.4f}, within {MARGIN:g}",
            above(bins, expected(bins)),
            -MARGIN,
            MARGIN,
        )
        for bins in BINS
    ),
    *(
        at_least(f"ScaNN: a target of {b:g} finds no less than {a:g}", targets(b, a), 0.0)
        for a, b in itertools.pairwise(TARGETS)
    ),
    between("ScaNN: a target of 0.5 is faster than one of 0.99 (ratio)", speed_of_less, 1.0),
    equal(
        f"ScaNN: a tree grown by {GROWN:.0%} finds what one built anew does, within {GROWN_MARGIN:g}",
        grown_and_rebuilt,
        GROWN_MARGIN,
    ),
)


def figure(arms: Sequence[Arm], path: Path) -> None:
    """Draws queries a second against recall, for ScaNN's targets."""
    points = [
        (
            clustered.mean_of(of_target(arms, target).cells(SPLIT)) or 0.0,
            statistics.mean(t.numbers[RATE] for t in of_target(arms, target).trials.values()),
        )
        for target in TARGETS
    ]
    with axes_in(path, f"recall@{K}", "queries a second") as axes:
        axes.plot(*zip(*points, strict=True), marker="o")


CARD = Card(
    name="recall",
    papers=(
        "Chern et al. 2022, TPU-KNN, arXiv:2206.14286",
        "Guo et al. 2020, ScaNN, arXiv:1908.10396",
        "Sun et al. 2023, SOAR, arXiv:2404.00774",
    ),
    claim="The recall of the best of M bins is known beforehand; ScaNN trades recall for speed along a curve.",
    design={
        TINY: "20,000 vectors of dimension 64 around 200 centres, 500 queries, 10 neighbours: 32, 128 and 512 bins, written out (the "
        "operation of a TPU is exact elsewhere); ScaNN's tree tuned to five recalls, and one that a tenth of the vectors joined "
        "afterwards. Three seeds of the vectors.",
        GPU: "The same with 200,000 vectors.",
        FULL: "The same with 1,000,000 vectors of dimension 128.",
    },
    expected="All should hold: the bound and the expectation are arithmetic, and ScaNN is tuned on its own vectors.",
    published=PUBLISHED,
    sweep=sweep,
    claims=CLAIMS,
    figure=figure,
    read=read,
    sabotages={
        "more_neighbours": Sabotage(
            "20 neighbours are searched for, where the formulas are told of 10",
            lambda sweep: sweep.override(k=2 * K),
            (CLAIMS[3].text, CLAIMS[4].text),
        )
    },
)

if __name__ == "__main__":
    reproduce.main(CARD)
