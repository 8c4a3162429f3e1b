"""Number of passages to read, and their place (Lewis et al. 2020, FiD, Lost in the Middle, HyDE).

python -m experiments.papers.depth --dry_run             the card and the runs, with estimates
python -m experiments.papers.depth                       all of it at tiny; again goes on where it stopped
python -m experiments.papers.depth --sabotage=other_documents     passages about other people
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.configs.ablate_depth import AblateDepth
from experiments.configs.paper import FULL, GPU, TINY
from experiments.papers import reproduce
from experiments.papers.card import Card, Sabotage
from experiments.papers.drawing import axes_in, log_ticks
from kafjax.core.config import changed
from kafjax.core.records import Prediction
from kafjax.core.rundir import read_jsonl, read_object
from kafjax.core.schema import checked
from kafjax.evaluation import clustered
from kafjax.evaluation.arms import METHOD, Arm, Trial, arms_of, named
from kafjax.evaluation.claims import Claim, Pair, at_least, between, greater
from kafjax.evaluation.intervals import Interval
from kafjax.evaluation.raw import is_found
from kafjax.evaluation.table import Table
from launch.spec import Sweep, product

DEPTHS = (1, 5, 10, 20)
PLACES = 5
MARGIN = 0.05
TOKENS, CALLS = "prompt_tokens", "calls"

PUBLISHED = Table(
    "What the papers report",
    ("paper", "measure", "value"),
    (
        ("Lewis et al. 2020", "Natural Questions, EM of RAG-Token / RAG-Sequence", "44.1 / 44.5"),
        ("Lewis et al. 2020", "RAG-Sequence rises to k = 50, RAG-Token peaks at k =", "10"),
        ("Izacard & Grave 2021", "10 to 100 passages: TriviaQA / Natural Questions", "+6 / +3.5"),
        (
            "Liu et al. 2023",
            "closed book / gold alone / gold in the middle of 20",
            "56.1 / 88.3 / 52.9",
        ),
        ("Gao et al. 2022", "DL19 nDCG@10: BM25 / Contriever / HyDE", "50.6 / 44.5 / 61.3"),
        ("Gao et al. 2022", "DL19 nDCG@10, HyDE with a fine-tuned encoder", "62.1 to 60.2"),
    ),
    ("The whole curve of Lost in the Middle was not found, and is not printed.",),
)


def sweep(scale: str) -> Sweep:
    """Retrieval with and without a hypothetical document, at every depth and place, and seeds."""
    base = changed(
        AblateDepth(),
        depths=(0, *DEPTHS),
        places=PLACES,
        latency_queries=0,
        retention=0,
        held_out=0,
        **{
            TINY: {"subjects": 24, "attributes": 2},
            GPU: {"subjects": 400, "dtype": "bfloat16"},
            FULL: {"corpus": "tfds:natural_questions/default", "dtype": "bfloat16"},
        }[scale],
    )
    return Sweep(base, product(method=["rag", "hyde"], seed=range(3)))


def read(folder: Path) -> list[Arm]:
    """Reads an arm for each method at each depth, and at each place among distractors."""
    trials = []
    for file in sorted(folder.glob("*/predictions.jsonl")):
        config = read_object(file.with_name("config.json"))
        by_arrangement: dict[tuple[int, str], list[Prediction]] = {}
        for row in read_jsonl(file):
            key = row.pop("seed"), row["method"]
            by_arrangement.setdefault(key, []).append(checked(Prediction, row, file))
        for (seed, arrangement), predictions in by_arrangement.items():
            numbers = {
                TOKENS: sum(p.prompt_tokens for p in predictions) / len(predictions),
                CALLS: sum(p.calls for p in predictions) / len(predictions),
            }
            settings = {METHOD: config["method"], "arrangement": arrangement}
            trials.append(
                Trial(settings, seed, predictions, None, "papers", file.parent, numbers=numbers)
            )
    return arms_of(trials)


def split_of(arms: Sequence[Arm]) -> str:
    """Names the split that all questions are of."""
    return next(p.split for arm in arms for t in arm.trials.values() for p in t.predictions)


def arm_of(arms: Sequence[Arm], arrangement: str, method: str = "rag") -> Arm:
    return named(arms, f"method={method},arrangement={arrangement}")


def found(arm: Arm) -> Arm:
    """Returns the arm with its recall in place of its answers: right where a gold passage stood in
    the prompt."""
    trials = {
        seed: dataclasses.replace(
            trial,
            predictions=[dataclasses.replace(p, correct=is_found(p)) for p in trial.predictions],
        )
        for seed, trial in arm.trials.items()
    }
    return dataclasses.replace(arm, trials=trials)


def pair(a: str, b: str, how: Callable[[Arm], Arm] = lambda arm: arm) -> Callable[..., Pair]:
    """Returns what reads two arrangements of `rag`, through `how`."""

    def measured(arms: Sequence[Arm]) -> Pair:
        split = split_of(arms)
        return how(arm_of(arms, a)).cells(split), how(arm_of(arms, b)).cells(split)

    return measured


def hyde_and_rag(arms: Sequence[Arm]) -> Pair:
    """Reads `hyde` and `rag` at one passage."""
    split = split_of(arms)
    return arm_of(arms, "k=1", "hyde").cells(split), arm_of(arms, "k=1").cells(split)


def last_and_first_place(arms: Sequence[Arm]) -> Pair | Interval:
    """Reads the gold passage nearest to the question, and farthest from it, among near ones;
    nothing where no question has one."""
    split = split_of(arms)
    if all(arm.settings["arrangement"] != "near: 1" for arm in arms):
        return Interval(None, None, None, 0)
    return (
        arm_of(arms, f"near: {PLACES}").cells(split),
        arm_of(arms, "near: 1").cells(split),
    )


def bend(arms: Sequence[Arm]) -> Interval:
    """Reads how far tokens are from linear in k: tokens a passage from 10 to 20 over those from 1
    to 10."""

    def tokens(seed: int, k: int) -> float:
        return arm_of(arms, f"k={k}").trials[seed].numbers[TOKENS]

    seeds = arm_of(arms, "k=1").trials
    return clustered.t_interval(
        [
            ((tokens(s, 20) - tokens(s, 10)) / 10) / ((tokens(s, 10) - tokens(s, 1)) / 9)
            for s in seeds
        ]
    )


def calls_of_hyde(arms: Sequence[Arm]) -> Interval:
    """Reads the calls of the language model that HyDE takes, over those of RAG."""
    hyde, rag = (arm_of(arms, "k=1", method) for method in ("hyde", "rag"))
    return clustered.t_interval(
        [hyde.trials[s].numbers[CALLS] / rag.trials[s].numbers[CALLS] for s in rag.trials]
    )


CLAIMS = (
    *(
        at_least(f"recall@{b} is no lower than recall@{a}", pair(f"k={b}", f"k={a}", found), 0.0)
        for a, b in itertools.pairwise(DEPTHS)
    ),
    greater("five passages beat one", pair("k=5", "k=1")),
    at_least("one prompt: the gain of five has faded by twenty", pair("k=5", "k=20"), 0.0),
    greater(
        "the gold passage does better next to the question than farthest from it",
        last_and_first_place,
    ),
    between("prompt tokens are linear in k (ratio of slopes)", bend, 0.9, 1.1),
    between("HyDE takes more calls than RAG (ratio)", calls_of_hyde, 1.5),
    Claim(
        "HyDE gains nothing beside a fine-tuned encoder, at one passage", hyde_and_rag, -1.0, MARGIN
    ),
)


def figure(arms: Sequence[Arm], path: Path) -> None:
    """Draws accuracy and recall against depth."""
    split = split_of(arms)
    with axes_in(path, "passages in the prompt", "share of questions") as axes:
        for method in ("rag", "hyde"):
            for what, how in (("right", lambda arm: arm), ("recall", found)):
                values = [
                    clustered.mean_of(how(arm_of(arms, f"k={k}", method)).cells(split)) or 0.0
                    for k in DEPTHS
                ]
                style = "-" if what == "right" else ":"
                axes.plot(DEPTHS, values, style, marker="o", label=f"{method}, {what}")
        log_ticks(axes, DEPTHS)


CARD = Card(
    name="depth",
    papers=(
        "Lewis et al. 2020, Retrieval-Augmented Generation, arXiv:2005.11401",
        "Izacard & Grave 2021, Fusion-in-Decoder, arXiv:2007.01282",
        "Liu et al. 2023, Lost in the Middle, arXiv:2307.03172",
        "Gao et al. 2022, Precise Zero-Shot Dense Retrieval without Relevance Labels (HyDE), arXiv:2212.10496",
    ),
    claim="More passages find more; a reader that has all of them in one prompt gains from some and not from many, and minds where the "
    "right one stands; a hypothetical document helps an encoder that was not trained for search.",
    design={
        TINY: "Gemma 3 270M reads 1 to 20 passages about 24 invented people with two facts each, found by MiniLM with the question or a "
        "hypothetical document; and the right passage at each of 5 places among near ones. Three seeds, each with people of its own. The "
        "reader is not trained.",
        GPU: "The same with 400 people and four facts, in bfloat16.",
        FULL: "Natural Questions. Fusing readers are not here: the claims are those of one prompt.",
    },
    expected="Recall is near 1 at k = 1 on invented names, so five passages should not beat one: the claim of gain is expected to fail. "
    "A small model is expected to favour the passage nearest to the question, rather than a U.",
    published=PUBLISHED,
    sweep=sweep,
    claims=CLAIMS,
    figure=figure,
    read=read,
    sabotages={
        "other_documents": Sabotage(
            "the passages are about other people",
            lambda sweep: sweep.override(corpus="biographies-control"),
            (CLAIMS[5].text,),
        )
    },
)

if __name__ == "__main__":
    reproduce.main(CARD)
