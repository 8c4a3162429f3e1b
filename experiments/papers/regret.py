"""LoRA Without Regret (Schulman et al. 2025): at its own rate LoRA trains as full fine-tuning does,
until its rank is full.

    python -m experiments.papers.regret --dry_run             the card and the runs, with estimates
    python -m experiments.papers.regret                       all of it at tiny; again goes on where it stopped
    python -m experiments.papers.regret --sabotage=rates_of_full     LoRA at the rates of full fine-tuning
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments.configs.finetune import Finetune
from experiments.configs.paper import FULL, GPU, TINY
from experiments.papers import reproduce, scratch
from experiments.papers.card import Card, Sabotage, finished
from experiments.papers.drawing import axes_in
from kafjax.core.config import changed
from kafjax.evaluation.arms import Arm, Trial, arms_of
from kafjax.evaluation.claims import between
from kafjax.evaluation.clustered import t_interval
from kafjax.evaluation.intervals import Interval
from kafjax.evaluation.table import Table
from launch.spec import Point, Sweep, chain, logspace, product, zip_

ROOT = Path("papers/scratch")
RANKS = (1, 4, 16, 64)
SMALL, LARGE = 16, 128
"""Rows a step."""
ALL, ATTENTION, MLP = "all-linear", "attention", "mlp"
SAME_SIZE = {ALL: 8, MLP: 12, ATTENTION: 23}
"""Ranks of about the same number of parameters in a layer of the scratch models: 11,776, 11,520
and 11,776 at width 64; the same ratios at any width."""
NATS = 0.05
"""Losses that differ by less count as equal, nats a token."""

PUBLISHED = Table(
    "Schulman et al. 2025",
    ("quantity", "value"),
    (
        ("best rate of LoRA over best rate of full, 14 models", "9.8"),
        ("the same for runs under about 100 steps", "15"),
        ("change of LoRA's best rate from rank 4 to 512", "below 2x"),
    ),
    ("Forgetting was not measured there.",),
)


def prepare(scale: str) -> None:
    """Makes the base and the corpus that are missing."""
    n = _SIZES[scale]
    scratch.write_facts(_corpus(scale), scratch.facts(n, seed=0))
    others = ROOT / f"others-{4 * n}"
    scratch.base_beside(_base(scale), scale, scratch.facts(n, seed=0), 4 * n, others)


def _base(scale: str) -> Path:
    return ROOT / f"regret-{scale}"


def _corpus(scale: str) -> Path:
    return ROOT / f"facts-{_SIZES[scale]}"


_SIZES = {TINY: 500, GPU: 4000, FULL: 20_000}


def sweep(scale: str) -> Sweep:
    """Full fine-tuning and LoRA over half-decades of rates, at two batches; LoRA at four ranks, on
    three sets of kernels of one size, and in its variants."""
    base = changed(
        Finetune(),
        model=str(_base(scale)),
        corpus=str(_corpus(scale)),
        freeze_embedding=True,
        epochs=20,
        batch_rows=SMALL,
        retention=0,
        held_out=0,
        alpha=32.0,
    )
    of_full, of_lora = logspace(-3.5, -1.5, 5), logspace(-2.5, -0.5, 5)
    grids = chain(
        product(method=["full"], batch_rows=[SMALL, LARGE], lr=of_full),
        product(rank=RANKS, lr=of_lora),
        product(rank=[RANKS[1], RANKS[-1]], batch_rows=[LARGE], lr=of_lora),
        product(zip_(targets=list(SAME_SIZE), rank=list(SAME_SIZE.values())), lr=of_lora),
        product(
            chain(
                product(rslora=[True], rank=[SAME_SIZE[ALL]]),
                product(dora=[True], rank=[SAME_SIZE[ALL]]),
                product(init=["pissa", "olora"], rank=[SAME_SIZE[ALL]]),
                product(lora_plus=[4.0], rank=[SAME_SIZE[ALL]]),
            ),
            lr=of_lora,
        ),
    )
    return Sweep(base, product(grids, seed=range(3)))


def read(folder: Path) -> list[Arm]:
    """Reads each training's curve; the last loss is the mean over its last tenth."""
    trials = []
    for config, _, rows in finished(folder):
        curve = [row["loss"] for row in rows]
        lora = config["method"] == "lora"
        settings = {
            "method": _variant(config) if lora else "full",
            "rank": config["rank"] if lora else 0,
            "targets": config["targets"] if lora else ALL,
            "batch": config["batch_rows"],
            "lr": config["lr"],
        }
        last = float(np.mean(curve[-max(len(curve) // 10, 1) :]))
        trials.append(Trial(settings, config["seed"], (), last, "papers", Path(), curve=curve))
    return arms_of(trials)


def _variant(config: Mapping[str, object]) -> str:
    if config["lora_plus"] != 1.0:
        return "lora+"
    if config["init"] != "lora":
        return str(config["init"])
    return "dora" if config["dora"] else "rslora" if config["rslora"] else "lora"


Losses = dict[int, dict[float, float]]
"""Last loss by seed and rate."""


def losses(
    arms: Sequence[Arm], method: str = "lora", rank: int = 0, targets: str = ALL, batch: int = SMALL
) -> Losses:
    """Returns the losses of what differs in nothing but rate and seed. Diverged trainings have
    none."""
    found: Losses = {}
    wanted = {"method": method, "rank": rank, "targets": targets, "batch": batch}
    for arm in arms:
        if all(arm.settings[name] == value for name, value in wanted.items()):
            for seed, trial in arm.trials.items():
                if trial.final_loss is not None:
                    found.setdefault(seed, {})[arm.settings["lr"]] = trial.final_loss
    return found


def best_rate(by_rate: Mapping[float, float]) -> float:
    """Returns the rate of the lowest loss: the vertex of a parabola in the logarithm of the rate
    through the best and its two neighbours, or the best itself at an edge."""
    rates = sorted(by_rate)
    at = min(range(len(rates)), key=lambda index: by_rate[rates[index]])
    if at in (0, len(rates) - 1):
        return rates[at]
    x = np.log10(rates[at - 1 : at + 2])
    a, b, _ = np.polyfit(x, [by_rate[rate] for rate in rates[at - 1 : at + 2]], 2)
    return float(10 ** (-b / (2 * a))) if a > 0 else rates[at]


def best_loss(by_rate: Mapping[float, float]) -> float:
    return min(by_rate.values())


def rates_ratio(
    one: Callable[..., Losses], other: Callable[..., Losses]
) -> Callable[..., Interval]:
    """Reads the ratio of two best rates: geometric mean over seeds, with Student's interval of the
    logarithm."""

    def measured(arms: Sequence[Arm]) -> Interval:
        a, b = one(arms), other(arms)
        logs = [math.log(best_rate(a[seed]) / best_rate(b[seed])) for seed in a if seed in b]
        found = t_interval(logs)
        bounds = (None if x is None else math.exp(x) for x in (found.value, found.low, found.high))
        return Interval(*bounds, found.n)

    return measured


def excess(one: Callable[..., Losses], other: Callable[..., Losses]) -> Callable[..., Interval]:
    """Reads how much higher the first one's best loss is, in nats a token, paired by seed."""

    def measured(arms: Sequence[Arm]) -> Interval:
        a, b = one(arms), other(arms)
        return t_interval([best_loss(a[seed]) - best_loss(b[seed]) for seed in a if seed in b])

    return measured


def penalty_growth(arms: Sequence[Arm]) -> Interval:
    """Reads how much LoRA's excess over full fine-tuning at the large batch shrinks from the lowest
    rank to the highest, in nats a token."""
    by_rank = [losses(arms, rank=rank, batch=LARGE) for rank in (RANKS[1], RANKS[-1])]
    return t_interval(
        [best_loss(by_rank[0][s]) - best_loss(by_rank[1][s]) for s in by_rank[0] if s in by_rank[1]]
    )


def leaving_step(arms: Sequence[Arm], rank: int, seed: int) -> float:
    """Finds the step at which an adapter's loss stays more than `NATS` above full fine-tuning's,
    each at its best rate, smoothed over a tenth of the steps."""
    full, lora = (
        _best_curve(arms, seed, method="full", rank=0),
        _best_curve(arms, seed, method="lora", rank=rank),
    )
    apart = lora - full > NATS
    within = np.flatnonzero(~apart)
    return float(within[-1] + 1 if within.size else 0)


def _best_curve(arms: Sequence[Arm], seed: int, method: str, rank: int) -> np.ndarray:
    rivals = [
        arm.trials[seed]
        for arm in arms
        if (arm.settings["method"], arm.settings["rank"]) == (method, rank)
        and (arm.settings["batch"], arm.settings["targets"]) == (SMALL, ALL)
        and seed in arm.trials
        and arm.trials[seed].final_loss is not None
    ]
    curve = np.asarray(min(rivals, key=lambda trial: trial.final_loss).curve)
    width = max(len(curve) // 10, 1)
    return np.convolve(curve, np.ones(width) / width, mode="valid")


def leaving_ratio(rank: int, than: int) -> Callable[..., Interval]:
    """Reads the ratio of the steps at which two ranks leave full's curve."""

    def measured(arms: Sequence[Arm]) -> Interval:
        seeds = sorted({seed for arm in arms for seed in arm.trials})
        steps = [[leaving_step(arms, r, seed) for r in (rank, than)] for seed in seeds]
        return t_interval([(one + 1) / (other + 1) for one, other in steps])

    return measured


def _lora(rank: int = SAME_SIZE[ALL], **others: object) -> Callable[..., Losses]:
    return lambda arms: losses(arms, rank=rank, **others)


def _full(arms: Sequence[Arm]) -> Losses:
    return losses(arms, method="full")


def _at_rate_of_full(point: Point) -> bool:
    return point.get("method") == "full" or point["lr"] < 4e-3


VARIANTS = ("rslora", "dora", "pissa", "olora", "lora+")
CLAIMS = (
    between(
        "the best rate of LoRA (rank 16) is 4 to 25 times that of full fine-tuning",
        rates_ratio(_lora(16), _full),
        4,
        25,
    ),
    between(
        "LoRA's best rate moves less than 2x from rank 4 to 64",
        rates_ratio(_lora(64), _lora(4)),
        0.5,
        2,
    ),
    *(
        between(
            f"at equal parameters {what} do at least as well as attention alone (excess loss, nats)",
            excess(
                _lora(SAME_SIZE[targets], targets=targets),
                _lora(SAME_SIZE[ATTENTION], targets=ATTENTION),
            ),
            -math.inf,
            NATS,
        )
        for what, targets in (("all kernels", ALL), ("those of the MLP", MLP))
    ),
    *(
        between(
            f"rank {rank} leaves full's curve later than rank {than} (ratio of steps)",
            leaving_ratio(rank, than),
            1.0,
        )
        for than, rank in itertools.pairwise(RANKS[:3])
    ),
    between(
        f"LoRA's loss at {LARGE} rows a step does not fall from rank 4 to 64 (nats)",
        penalty_growth,
        -math.inf,
        NATS,
    ),
    *(
        between(
            f"vanilla LoRA is within {NATS:g} nats of {variant}, each at its best rate",
            excess(_lora(), _lora(method=variant)),
            -math.inf,
            NATS,
        )
        for variant in VARIANTS
    ),
)


def figure(arms: Sequence[Arm], path: Path) -> None:
    """Draws the last loss against the rate, for full fine-tuning and each rank."""
    with axes_in(path, "learning rate", "last loss, nats a token") as axes:
        shown = [("full", 0), *(("lora", rank) for rank in RANKS)]
        for method, rank in shown:
            by_seed = losses(arms, method=method, rank=rank)
            rates = sorted(set().union(*by_seed.values()))
            means = [np.mean([of[rate] for of in by_seed.values() if rate in of]) for rate in rates]
            axes.plot(rates, means, marker="o", label=method if not rank else f"rank {rank}")
        axes.set_xscale("log")


CARD = Card(
    name="regret",
    papers=(
        "Schulman et al. 2025, LoRA Without Regret, Thinking Machines Lab",
        "against it: arXiv:2602.06204, arXiv:2602.04998",
    ),
    claim="LoRA trains as well as full fine-tuning while its rank is not full, at a rate about ten times as high that does not depend on "
    "the rank; on all kernels or the MLP rather than on attention; and it minds large batches, whatever the rank.",
    design={
        TINY: "A base of 0.2 M parameters, trained on 2,000 people, learns where 500 others were born, each asked 20 times. Full and LoRA "
        "(rank 1, 4, 16, 64) at five rates each, full and ranks 4 and 64 also at 128 rows a step instead of 16; attention, MLP and all "
        "kernels at equal parameters; five variants of LoRA at five rates. Three seeds. Losses in training.",
        GPU: "A base of 4 M parameters and 4,000 people.",
        FULL: "A base of 30 M parameters and 20,000 people. The paper's models are Llama 3 and Qwen 3, on Tulu 3 and OpenThoughts.",
    },
    expected="The ratio of rates and its independence of rank should hold. Facts are told often and are many bits, so low ranks should "
    "leave full's curve early. Whether the batch's penalty shows with some dozen steps is open; PiSSA and OLoRA begin from large "
    "directions, and may be ahead on so small a base.",
    published=PUBLISHED,
    prepare=prepare,
    sweep=sweep,
    claims=CLAIMS,
    figure=figure,
    read=read,
    sabotages={
        "rates_of_full": Sabotage(
            "adapters train at no more than 3e-3, a good rate of full fine-tuning",
            lambda sweep: dataclasses.replace(sweep, points=sweep.points.where(_at_rate_of_full)),
            (CLAIMS[0].text,),
        )
    },
)

if __name__ == "__main__":
    reproduce.main(CARD)
