"""Knowledge capacity (Physics of Language Models 3.3), of adapters: how many bits a rank can hold.

python -m experiments.papers.capacity --dry_run             the card and the runs, with estimates
python -m experiments.papers.capacity                       all of it at tiny; again goes on where it stopped
python -m experiments.papers.capacity --sabotage=wrong_rate     adapters that learn nothing
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from experiments.configs.finetune import Finetune
from experiments.configs.paper import FULL, GPU, TINY
from experiments.papers import reproduce, scratch
from experiments.papers.card import Card, Sabotage, finished
from experiments.papers.drawing import axes_in
from kafjax.core.config import changed
from kafjax.corpus.people import ATTRIBUTES, POOLS
from kafjax.evaluation import clustered
from kafjax.evaluation.arms import Arm, Trial, arms_of, named
from kafjax.evaluation.claims import between
from kafjax.evaluation.intervals import Interval
from kafjax.evaluation.table import Table
from launch.spec import Sweep, chain, product

ROOT = Path("papers/scratch")
POOL = len(POOLS[ATTRIBUTES[0].name])
"""Values that an answer is drawn from: a fact that is not known costs log2 of it."""
FEW, MANY, PARTS = 500, 2000, 8
RANKS = (1, 4, 16)
BITS, A_PARAMETER, SHARE = "bits", "bits_a_parameter", "share"

PUBLISHED = Table(
    "Allen-Zhu & Li 2024, GPT-2 from scratch, bits a parameter",
    ("exposures", "bits a parameter"),
    (("1000", "2"), ("100", "1")),
    (
        "At most 2 bits a parameter, whatever the size; fewer where a fact is told 100 times. Facts are "
        "stated in biographies there, and asked as questions here.",
    ),
)


def corpus(n: int, part: int | None = None) -> Path:
    """Folder of `n` facts, or of one of `PARTS` parts of them."""
    return ROOT / (f"facts-{n}" if part is None else f"facts-{n}-part-{part}")


def prepare(scale: str) -> None:
    """Makes the base and the corpora that are missing."""
    n_few, n_many = _SIZES[scale]
    for n in (n_few, n_many):
        scratch.write_facts(corpus(n), scratch.facts(n, seed=0))
    for part in range(PARTS):
        scratch.write_facts(corpus(n_many, part), scratch.facts(n_many, seed=0)[part::PARTS])
    others = ROOT / f"others-{n_many}"
    scratch.base_beside(_base(scale), scale, scratch.facts(n_many, seed=0), n_many, others)


def _base(scale: str) -> Path:
    return ROOT / f"capacity-{scale}"


_SIZES = {TINY: (FEW, MANY), GPU: (4000, 16_000), FULL: (20_000, 80_000)}


def sweep(scale: str) -> Sweep:
    """Ranks x numbers of facts x seeds; and at equal parameters eight adapters of rank 4, each for
    a part of the facts, beside one of rank 32."""
    n_few, n_many = _SIZES[scale]
    base = changed(
        Finetune(),
        model=str(_base(scale)),
        lr=1e-2,
        alpha=16.0,
        rslora=True,
        epochs=100,
        batch_rows=32,
        retention=0,
        held_out=0,
    )
    whole = product(corpus=[str(corpus(n_few)), str(corpus(n_many))], rank=RANKS)
    one = product(corpus=[str(corpus(n_many))], rank=[32])
    parts = product(corpus=[str(corpus(n_many, part)) for part in range(PARTS)], rank=[4])
    return Sweep(base, product(chain(whole, one, parts), seed=range(3)))


def read(folder: Path) -> list[Arm]:
    """Reads the bits of each adapter. Those of parts are one arm, `how=parts`, whose bits are
    summed."""
    found: dict[tuple[str, int, int, int], list[tuple[float, float, int]]] = {}
    for config, took, rows in finished(folder):
        name, _, part = Path(config["corpus"]).name.partition("-part-")
        n_facts = int(name.removeprefix("facts-")) // (PARTS if part else 1)
        key = "parts" if part else "whole", int(name.removeprefix("facts-"))
        learned = bits(rows, n_facts, config["epochs"])
        known = n_facts * math.log2(POOL)
        found.setdefault((*key, config["rank"], config["seed"]), []).append(
            (learned, known, took.trainable_parameters)
        )
    return arms_of([_trial(*key, parts) for key, parts in found.items()])


def bits(rows: Sequence[dict[str, float]], n_facts: int, epochs: int) -> float:
    """Computes the bits learned from the losses of a training: what guessing the answers costs,
    less what they cost in the last epoch (Allen-Zhu & Li 2024, theorem 3.2, for values alone)."""
    last = rows[-math.ceil(len(rows) / epochs) :]
    targets = sum(row["targets"] for row in last)
    nats_a_target = sum(row["loss"] * row["targets"] for row in last) / targets
    targets_a_fact = sum(row["targets"] for row in rows) / (n_facts * epochs)
    return n_facts * (math.log2(POOL) - nats_a_target * targets_a_fact / math.log(2))


def _trial(
    how: str, facts: int, rank: int, seed: int, parts: Sequence[tuple[float, float, int]]
) -> Trial:
    learned, known, parameters = map(sum, zip(*parts, strict=True))
    numbers = {BITS: learned, SHARE: learned / known, A_PARAMETER: learned / parameters}
    settings = {"how": how, "facts": facts, "rank": rank}
    return Trial(settings, seed, (), None, "papers", Path(), numbers=numbers)


def number(arm: Arm, name: str) -> dict[int, float]:
    """Returns a number of an arm by seed."""
    return {seed: trial.numbers[name] for seed, trial in arm.trials.items()}


def of(name: str, arm: str) -> Callable[[Sequence[Arm]], Interval]:
    """Reads a number of one arm, with Student's interval over seeds."""
    return lambda arms: clustered.t_interval(list(number(find(arms, arm), name).values()))


def ratio(name: str, arm: str, than: str) -> Callable[[Sequence[Arm]], Interval]:
    """Reads the ratio of a number of two arms, paired by seed."""

    def measured(arms: Sequence[Arm]) -> Interval:
        one, other = number(find(arms, arm), name), number(find(arms, than), name)
        return clustered.t_interval([one[seed] / other[seed] for seed in one if seed in other])

    return measured


def find(arms: Sequence[Arm], wanted: str) -> Arm:
    """Finds an arm by `how,size,rank`, where size is `few` or `many`."""
    how, size, rank = wanted.split(",")
    sizes = sorted({arm.settings["facts"] for arm in arms})
    facts = sizes[0] if size == "few" else sizes[-1]
    return named(arms, f"how={how},facts={facts},rank={rank}")


CLAIMS = (
    between(
        "rank 4 holds more of many facts than rank 1 (ratio of bits)",
        ratio(BITS, "whole,many,4", "whole,many,1"),
        1.0,
    ),
    between(
        "rank 16 holds more of many facts than rank 4 (ratio of bits)",
        ratio(BITS, "whole,many,16", "whole,many,4"),
        1.0,
    ),
    between(
        "rank 1 is full: bits of many facts over bits of few are far below their number's ratio of 4",
        ratio(BITS, "whole,many,1", "whole,few,1"),
        0.0,
        2.0,
    ),
    between("rank 1 holds at most 2 bits a parameter", of(A_PARAMETER, "whole,many,1"), 0.0, 2.0),
    between("rank 16 knows nearly all of few facts", of(SHARE, "whole,few,16"), 0.9),
    between(
        "eight adapters of rank 4, each for a part, hold at least as much as one of rank 32 (ratio of bits)",
        ratio(BITS, "parts,many,4", "whole,many,32"),
        0.95,
    ),
)


def figure(arms: Sequence[Arm], path: Path) -> None:
    """Draws the bits of adapters against their rank, for few and for many facts."""
    with axes_in(path, "rank", "bits learned (dotted: all there are)") as axes:
        for facts in sorted({arm.settings["facts"] for arm in arms}):
            points = sorted(
                (arm.settings["rank"], float(np.mean(list(number(arm, BITS).values()))))
                for arm in arms
                if arm.settings["facts"] == facts and arm.settings["how"] == "whole"
            )
            axes.plot(*zip(*points, strict=True), marker="o", label=f"{facts} facts")
            axes.axhline(facts * math.log2(POOL), linestyle=":", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")


CARD = Card(
    name="capacity",
    papers=(
        "Allen-Zhu & Li 2024, Physics of Language Models: Part 3.3, Knowledge Capacity Scaling Laws, arXiv:2404.05405",
        "LoRA as knowledge memory, arXiv:2603.01097",
    ),
    claim="A model stores about 2 bits a parameter of facts that it saw 1,000 times and 1 of those it saw 100 times; a small adapter is "
    "full before a large one; at equal parameters several small adapters hold no less than one.",
    design={
        TINY: f"A base of 0.2 M parameters, trained on {MANY} other people, learns where {FEW} or {MANY} people were born (one of {POOL} "
        "cities), each asked 100 times, by adapters of rank 1, 4 and 16 on all kernels, and at equal parameters by one of rank 32 or "
        "eight of rank 4 with a part of the people each. Three seeds. Bits: those of a guess, less those of the answer in the last epoch.",
        GPU: "A base of 4 M parameters and 4,000 or 16,000 people.",
        FULL: "A base of 30 M parameters and 20,000 or 80,000 people.",
    },
    expected="The order of ranks should hold. One rate serves all ranks (rsLoRA's scale), so the largest may learn less than it could. "
    "Facts are told 100 times, so about 1 bit a parameter at most, and less where Adam has not finished.",
    published=PUBLISHED,
    prepare=prepare,
    sweep=sweep,
    claims=CLAIMS,
    figure=figure,
    read=read,
    sabotages={
        "wrong_rate": Sabotage(
            "the rate is 1e-6, at which nothing is learned",
            lambda sweep: sweep.override(lr=1e-6),
            (CLAIMS[0].text, CLAIMS[1].text, CLAIMS[4].text),
        )
    },
)

if __name__ == "__main__":
    reproduce.main(CARD)
