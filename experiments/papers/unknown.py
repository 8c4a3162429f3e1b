"""New knowledge and hallucination (Gekhman et al. 2024): what fitting unknown facts does to known
ones.

    python -m experiments.papers.unknown --dry_run             the card and the runs, with estimates
    python -m experiments.papers.unknown                       all of it at tiny; again goes on where it stopped
    python -m experiments.papers.unknown --sabotage=wrong_rate     nothing is fitted
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from experiments.configs.paper import FULL, GPU, TINY
from experiments.configs.sweep_lora import SweepLora
from experiments.papers import reproduce, scratch
from experiments.papers.card import Card, Sabotage, read_runs
from experiments.papers.drawing import axes_in, log_ticks
from kafjax import hub
from kafjax.core.config import changed
from kafjax.core.errors import UserError
from kafjax.core.progress import say
from kafjax.core.records import Question
from kafjax.core.rundir import read_jsonl
from kafjax.corpus.retention import world_questions
from kafjax.evaluation import clustered
from kafjax.evaluation.arms import Arm, arms_of, named
from kafjax.evaluation.claims import Pair, at_least, between, greater
from kafjax.evaluation.intervals import Interval
from kafjax.evaluation.score import contains
from kafjax.evaluation.table import Table
from kafjax.generation import Generator, Sampling
from kafjax.prompts.prompt import Plain
from launch.spec import Sweep, product

ROOT = Path("papers/unknown")
SPLIT = "untrained"
MARGIN = 0.05
KNOWN, UNKNOWN, MIXED = "known", "unknown", "mixed"
EARLY, LONG = 3, 30
"""Passes."""
FITTED = 0.2
"""Training loss, nats a token, at which facts count as fitted."""
COUNTRIES = 80

PUBLISHED = Table(
    "Gekhman et al. 2024, PaLM 2, accuracy on the test set, fine-tuned on facts of one kind",
    ("fine-tuned on", "early stop", "convergence"),
    (
        ("Unknown", "37.5", "25.8"),
        ("MaybeKnown", "43.6", "43.2"),
        ("HighlyKnown", "40.5", "40.0"),
    ),
)


def prepare(scale: str) -> None:
    """Asks the model about countries, and writes three corpora: known facts, unknown ones, and half
    of each. All are asked known facts that none trains on."""
    if all((ROOT / f"{scale}-{name}").exists() for name in (KNOWN, UNKNOWN, MIXED)):
        return
    known = _known(_MODELS[scale])
    trained, asked = known[::2], known[1::2]
    if len(asked) < clustered.FEW:
        raise UserError(f"the model knows {len(known)} of the facts asked, too few to split")
    test = [_row(question, SPLIT) for question in asked]
    old = [_row(question, "train") for question in trained]
    new = scratch.facts(len(old), seed=0)
    half = len(old) // 2
    for name, rows in ((KNOWN, old), (UNKNOWN, new), (MIXED, [*old[:half], *new[half:]])):
        scratch.write_facts(ROOT / f"{scale}-{name}", [*rows, *test])


_MODELS = {TINY: "gemma3-270m", GPU: "google/gemma-3-4b-pt", FULL: "google/gemma-3-12b-pt"}


def _known(name: str) -> list[Question]:
    """Lists the questions about countries that a model answers right, greedily."""
    say("unknown", f"asking {name} what it knows")
    model, params = hub.load_decoder(name)
    asked = [q for half in world_questions(COUNTRIES) for q in half]
    generator, prompts = Generator(model, hub.tokenizer(name)), Plain()
    texts = [prompts.closed_book_prefix() + prompts.closed_book(q.text) for q in asked]
    replies = generator.generate(params, texts, Sampling(max_new_tokens=12))
    return [
        q
        for q, reply in zip(asked, replies, strict=True)
        if contains(reply.text.strip().split("\n")[0], q.answers)
    ]


def _row(question: Question, split: str) -> dict[str, object]:
    return {
        "id": f"{question.id}-{split}",
        "question": question.text,
        "golden_answers": list(question.answers),
        "split": split,
        "subject": question.subject,
    }


def sweep(scale: str) -> Sweep:
    """Kinds of facts x passes; the seeds are lanes."""
    base = changed(
        SweepLora(),
        model=_MODELS[scale],
        ranks=(16,),
        lrs=(1e-3,),
        seeds=(0, 1, 2),
        retention=0,
        held_out=0,
        **({} if scale == TINY else {"dtype": "bfloat16"}),
    )
    corpora = [str(ROOT / f"{scale}-{name}") for name in (KNOWN, UNKNOWN, MIXED)]
    return Sweep(base, product(corpus=corpora, epochs=[EARLY, LONG]))


def read(folder: Path) -> list[Arm]:
    """Reads the arms by kind of fact and passes, each lane with its losses."""
    trials = []
    for arm in read_runs(folder):
        for trial in arm.trials.values():
            run, lane = trial.run.parents[1], trial.run.name
            curve = [row["loss"] for row in _rows(run) if row.get("label") == lane]
            kind = Path(str(trial.settings["corpus"])).name.rpartition("-")[2]
            settings = {"kind": kind, "passes": trial.settings["epochs"]}
            trials.append(dataclasses.replace(trial, settings=settings, curve=curve))
    return arms_of(trials)


def _rows(run: Path) -> Iterable[dict[str, object]]:
    return read_jsonl(run / "metrics.jsonl", skip_broken_tail=True)


def pair(a: str, passes: int, b: str, than: int) -> Callable[[Sequence[Arm]], Pair]:
    """Returns what reads the share of known facts that two trainings still answer."""

    def measured(arms: Sequence[Arm]) -> Pair:
        one, other = (
            named(arms, f"kind={kind},passes={n}").cells(SPLIT)
            for kind, n in ((a, passes), (b, than))
        )
        return one, other

    return measured


def fitting_ratio(arms: Sequence[Arm]) -> Interval:
    """Reads the steps until unknown facts are fitted over those of known ones, paired by seed. What
    is never fitted takes all steps."""
    unknown, known = (named(arms, f"kind={kind},passes={LONG}").trials for kind in (UNKNOWN, KNOWN))
    return clustered.t_interval(
        [steps_to_fit(unknown[s].curve) / steps_to_fit(known[s].curve) for s in unknown]
    )


def steps_to_fit(curve: Sequence[float]) -> int:
    """Counts the steps until the loss, over a tenth of the training, is below `FITTED`."""
    width = max(len(curve) // 10, 1)
    smooth = np.convolve(curve, np.ones(width) / width, mode="valid")
    below = np.flatnonzero(smooth < FITTED)
    return int(below[0] if below.size else len(smooth) - 1) + 1


CLAIMS = (
    between("unknown facts take more steps to fit than known ones (ratio)", fitting_ratio, 1.0),
    greater(
        f"after {LONG} passes known facts suffer more from unknown ones than from known ones",
        pair(KNOWN, LONG, UNKNOWN, LONG),
    ),
    at_least(
        f"stopping after {EARLY} passes is no worse than after {LONG}, on unknown facts",
        pair(UNKNOWN, EARLY, UNKNOWN, LONG),
        MARGIN,
    ),
    at_least(
        f"after {LONG} passes a half of known facts softens it",
        pair(MIXED, LONG, UNKNOWN, LONG),
        0.0,
    ),
)


def figure(arms: Sequence[Arm], path: Path) -> None:
    """Draws the share of known facts still answered against passes."""
    with axes_in(
        path, "passes over the facts", "known facts still answered", legend="trained on"
    ) as axes:
        for kind in (KNOWN, MIXED, UNKNOWN):
            found = [
                clustered.mean(named(arms, f"kind={kind},passes={n}").cells(SPLIT))
                for n in (EARLY, LONG)
            ]
            axes.plot((EARLY, LONG), [one.value for one in found], marker="o", label=kind)
        log_ticks(axes, (EARLY, LONG))


CARD = Card(
    name="unknown",
    papers=(
        "Gekhman et al. 2024, Does Fine-Tuning LLMs on New Knowledge Encourage Hallucinations?, arXiv:2405.05904",
        "arXiv:2502.14502",
    ),
    claim="Facts that a model does not know are fitted more slowly than those that it knows, and once they are fitted it answers known "
    "ones worse; an early stop, or known facts among them, soften it.",
    design={
        TINY: "Gemma 3 270M is asked about 160 countries; half of what it knows is trained on and half is asked afterwards. A LoRA adapter "
        "of rank 16 learns as many facts that it knows, that nobody can know (invented people), or half and half, in 3 or 30 passes. "
        "Three seeds.",
        GPU: "Gemma 3 4B, in bfloat16.",
        FULL: "Gemma 3 12B. The paper's PaLM 2 is not public, and its facts are of EntityQuestions.",
    },
    expected="The slower fit should show. Known facts of a small model are few, so a fall of ten points is at the edge of what can be "
    "found. Known facts are capitals, currencies and continents, and the unknown ones ask where people were born: the fall is one "
    "over kinds of questions, as in the paper's test set.",
    published=PUBLISHED,
    prepare=prepare,
    sweep=sweep,
    claims=CLAIMS,
    figure=figure,
    read=read,
    sabotages={
        "wrong_rate": Sabotage(
            "the rate is so low that nothing is fitted",
            lambda sweep: sweep.override(lrs=(1e-7,)),
            (CLAIMS[0].text, CLAIMS[1].text),
        )
    },
)

if __name__ == "__main__":
    reproduce.main(CARD)
