"""The protocol of docs/protocol.md from end to end: tune each arm with equal effort on development
subjects, then train with several seeds and ask about test subjects.

    python -m experiments.study --dry_run      what is left to run, and how long it may take
    python -m experiments.study                run it; stop it at any time, and give the same command again
    python -m experiments.study --seeds=2 --subjects=8 --out=small --runs=small_runs

    base                 what the untouched model says, and finds of prose
    tune-lora-0, ...     one trial each: rates of lora and full, settings of rag; asked about development subjects only
    best-seed0, ...      the best settings of each arm. Seed 0 has all arms, the others those that train: the rest
                         trains nothing, reads greedily, and so says the same for every seed
    mild-seed0, ...      of trained arms, the best rates among those that forget little, where they are others

Every step is a comparison in a process of its own, in a folder of --runs, where it can be looked
at. Written to --out: table.md, chosen.json, answers.jsonl.gz (every answer), the configuration and
results of every step, figures.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from experiments import build, planning, study_report
from experiments.comparison import load_arm
from experiments.configs.compare import Compare
from experiments.configs.study import Study
from kafjax import hub
from kafjax.core.command_line import arguments_of
from kafjax.core.config import changed, leaves
from kafjax.core.errors import UserError
from kafjax.core.progress import say
from kafjax.core.rundir import Run, read_object
from kafjax.corpus import open_corpus
from kafjax.evaluation import clustered, tuning
from kafjax.evaluation.results import BASE, DEVELOPMENT, RAG, Arm, forgotten
from kafjax.evaluation.tuning import Tried, Values
from kafjax.methods import METHODS
from kafjax.training.forecast import show_seconds

RATES = {"lora": "lr_lora", "full": "lr_full"}
"""Arms that are trained and tuned, by name, with the flag of their rate."""
ONCE = ("lora-documents", "lora-supervised", "lora-single", "reader+rag")
"""Arms that show where the headline lies between regimes, with one seed."""
TRAINED = ("lora", "full", "lora+rag", "full+rag")
ASKED = ("untrained", "paraphrase", "seen", "control")
SECONDS_A_REPLY = 0.3
"""Rough time of an answer on two cores, mean over closed-book and reading arms, for `--dry_run`: a
comparison of eight arms took 0.6 s (docs/results.md), hyde and timed queries included."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One comparison: the folder's name, its methods, and settings that differ from the study's."""

    name: str
    methods: tuple[str, ...]
    values: Values


def run(config: Study) -> None:
    """Runs what is left of the study and writes its results.

    Raises:
      UserError: a comparison failed; its own message stands above.
    """
    if config.dry_run:
        print(_forecast(config))
        return
    _do(config, _base())
    tried = {name: _tune(config, name) for name in (*RATES, RAG)}
    chosen = _chosen(config, tried)
    for step in (steps := _final(config, chosen)):
        _do(config, step)
    study_report.write(config, chosen, tried, {step.name: _folder(config, step) for step in steps})


def _base() -> Step:
    return Step("base", (BASE,), {"ask": (*ASKED, DEVELOPMENT)})


def _tune(config: Study, name: str) -> list[Tried]:
    """Makes the trials of an arm, each chosen by those before."""
    tried: list[Tried] = []
    base = _arm(config, _base(), BASE)
    while len(tried) < config.trials:
        values = _next(config, name, tried)
        step = Step(f"tune-{name}-{len(tried)}", (name,), {"ask": (DEVELOPMENT,), **values})
        _do(config, step)
        arm = _arm(config, step, name)
        asked = {0: [p for p in arm.predictions if p.split == DEVELOPMENT]}
        right = clustered.mean_of(clustered.cells(asked)) or 0.0
        tried.append(Tried(values, right, forgotten(arm, base) if name in RATES else None))
        say("study", f"{step.name}: {dict(values)}: {right:.0%} right on {DEVELOPMENT}")
    return tried


def _next(config: Study, name: str, tried: Sequence[Tried]) -> Values:
    settings = config.compare.settings
    if name in RATES:
        return tuning.next_rate(RATES[name], tried, getattr(settings, RATES[name]))
    flags = ("k", "retriever", "best_last")
    return tuning.next_reading(tried, {flag: getattr(settings.retrieval, flag) for flag in flags})


def _chosen(config: Study, tried: Mapping[str, Sequence[Tried]]) -> dict[str, dict[str, Values]]:
    """Returns the settings of each choice by arm: `best`, and `mild` of those that train."""
    best = {name: tuning.best(trials).values for name, trials in tried.items()}
    mild = {name: tuning.best(tried[name], config.most_forgotten).values for name in RATES}
    return {"best": best, "mild": mild}


def _final(config: Study, chosen: Mapping[str, Mapping[str, Values]]) -> list[Step]:
    best = {flag: value for values in chosen["best"].values() for flag, value in values.items()}
    steps = []
    for seed in range(config.seeds):
        methods = (*METHODS, *ONCE) if seed == 0 else TRAINED
        more = {"latency_queries": Compare().latency_queries, "realign": Compare().realign}
        values = {"ask": ASKED, **best, "seed": seed, **(more if seed == 0 else {})}
        steps.append(Step(f"best-seed{seed}", methods, values))
    others = tuple(n for n in RATES if chosen["mild"][n] != chosen["best"][n])
    mild = {flag: value for n in others for flag, value in chosen["mild"][n].items()}
    return steps + [
        Step(f"mild-seed{seed}", others, {"ask": ASKED, **mild, "seed": seed})
        for seed in range(config.seeds if others else 0)
    ]


def _do(config: Study, step: Step) -> None:
    """Runs a step to its end, unless it has been. A step that was stopped goes on where it was."""
    results = _folder(config, step) / "results.json"
    if results.exists() and not read_object(results)["pending"]:
        return
    say("study", f"{step.name}: {', '.join(step.methods)}")
    command = [sys.executable, "-m", "experiments.compare", *_arguments(config, step)]
    code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
    if code:
        raise UserError(f"{step.name} ended with exit code {code}; the same command goes on there")


def _arguments(config: Study, step: Step) -> list[str]:
    compare = changed(
        config.compare, **{"realign": 0, **step.values}, methods=step.methods, name=step.name
    )
    return arguments_of(Compare, {leaf.flag: leaf.of(compare) for leaf in leaves(compare)})


def _folder(config: Study, step: Step) -> Path:
    return Path(config.compare.run.runs) / step.name


def _arm(config: Study, step: Step, name: str) -> Arm:
    arm = load_arm(Run(_folder(config, step)), name)
    if arm is None:
        raise UserError(f"{_folder(config, step)} lacks {name}; delete the folder to run it again")
    return arm


def _planned(config: Study) -> Iterator[Step]:
    """Yields all steps, as if each arm's default settings were chosen and the mild ones others."""
    yield _base()
    for name in (*RATES, RAG):
        for number in range(config.trials):
            yield Step(f"tune-{name}-{number}", (name,), {"ask": (DEVELOPMENT,)})
    settings = {name: {flag: 0.5} for name, flag in RATES.items()}
    yield from _final(config, {"best": {name: {} for name in RATES}, "mild": settings})


def _forecast(config: Study) -> str:
    """Says what is left: trainings as forecast from this machine's speed, answers by a rule of
    thumb."""
    compare = config.compare
    corpus = open_corpus(compare.corpus, compare.settings.seed)
    tokenizer = hub.tokenizer(compare.model.model)
    template = build.open_template(compare.model.model, compare.model.chat)
    model, prompts = build.asked_through(
        template, hub.describe_decoder(compare.model.model), tokenizer
    )
    left = [s for s in _planned(config) if not (_folder(config, s) / "results.json").exists()]
    names = list(dict.fromkeys(name for step in left for name in step.methods))
    expected = planning.of_weights(names, compare, corpus, model, tokenizer, prompts)
    trainings = {name: sum(name in step.methods for step in left) for name in expected}
    n_asked = {
        split: sum(q.split == split for q in corpus.questions) for split in (*ASKED, DEVELOPMENT)
    }
    replies = sum(
        len(step.methods) * (sum(n_asked[s] for s in step.values["ask"]) + len(corpus.retention))
        for step in left
    )
    training = sum(expected[name].seconds * n for name, n in trainings.items())
    asking = SECONDS_A_REPLY * replies
    lines = [f"{len(left)} comparisons are left, at most: the mild choice may be the best one."]
    lines += [f"{name}: {trainings[name]} trainings, each {one}" for name, one in expected.items()]
    lines += [
        f"trainings {show_seconds(training)}, {replies:,} answers about {show_seconds(asking)}, "
        f"together about {show_seconds(training + asking)}; reader+rag trains, too, and is not forecast."
    ]
    return "\n".join(lines)


def main() -> None:
    build.start(Study, run)


if __name__ == "__main__":
    main()
