"""Compares ways to give a language model the knowledge of a corpus, on one set of questions and one
bill.

    python -m experiments.compare                                    all eight methods on invented biographies
    python -m experiments.compare --profile=smoke                    the same with fewer people, a few minutes on two cores
    python -m experiments.compare --methods=base,rag --corpus=DIR    two methods on your own documents (FlashRAG's format)
    python -m experiments.compare --methods=full,lora --replay=0.5   does mixing in other matters soften forgetting?
    python -m experiments.compare --rank=4 --name=rank4              one thing changed, in a folder of its own
    python -m experiments.compare --methods=lora,rslora,dora+rag     variants of LoRA, beside and under retrieval
    python -m experiments.compare --config=runs/rank4/config.json --seed=1       an earlier run again, one thing changed
    python -m experiments.compare --mesh=fsdp:4,tensor:2             a model spread over eight devices of this host

Methods: base (the model as it came), oracle (an answering passage in the prompt), rag, hyde, lora,
full, lora+rag, full+rag. Rows appear as methods finish. A variant of LoRA stands for lora, and any
weights go with any reader: --methods=dora,lora+hyde. The run's folder, runs/NAME, holds
config.json, metrics.jsonl, predictions.jsonl, results.json, table.md, figures and report.html. The
same command again goes on where a broken run stopped.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from absl import flags

from experiments import build, planning
from experiments.comparison import (
    clear_finished,
    load_arm,
    refuse_other_questions,
    run_arm,
    save_arm,
    write_results,
)
from experiments.configs.compare import PROFILES, Compare
from kafjax import hub
from kafjax.core.command_line import command_of
from kafjax.core.config_record import record
from kafjax.core.errors import UserError, nearest
from kafjax.core.paths import as_path
from kafjax.core.progress import say
from kafjax.core.records import Corpus
from kafjax.core.rundir import environment, find_run, open_run
from kafjax.corpus import open_corpus
from kafjax.evaluation import comparison_tables, table
from kafjax.methods import BASE, METHODS, in_running_order, open_method, parts
from kafjax.training.checksum import weights_hash
from kafjax.training.forecast import Forecast, renewing

LESS = "for less of it: --budget=10m, --epochs, --steps, or --methods without those that train"


def run(config: Compare) -> dict[str, Any]:
    """Compares the methods, resuming what an earlier start of the same run has finished. Returns
    the contents of results.json.

    Raises:
      UserError: anything that the user can mend, before the first file is written wherever it can
        be known.
    """
    began = time.monotonic()
    if not config.methods:
        raise UserError(f"--methods is empty; choose from {', '.join(METHODS)}")
    names = in_running_order(list(config.methods))
    corpus, tokenizer = (
        open_corpus(config.corpus, config.settings.seed),
        hub.tokenizer(config.model.model),
    )
    asking = _asking(corpus, config.ask)
    config = build.with_limit(config, corpus, tokenizer, label="compare")
    template = build.open_template(config.model.model, config.model.chat)
    if config.budget is not None:
        model, prompts = build.asked_through(
            template, hub.describe_decoder(config.model.model), tokenizer
        )
        expected = planning.of_weights(names, config, corpus, model, tokenizer, prompts)
        return run(planning.within(config, config.budget, expected, label="compare"))
    settings = dataclasses.replace(config.settings, document_parts=config.corpus.document_parts)
    also = build.corpus_identity(config.corpus, corpus) | build.chat_identity(template)
    where = {"prefix": config.profile, "also": also}
    root = as_path(config.run.runs)
    found = find_run(root, config.run.name, config, **where)
    forecasts: dict[str, Forecast] = {}
    lab = build.open_lab(
        config.model,
        settings,
        config.mesh,
        found,
        corpus,
        template,
        trains=True,
        index=config.index,
        log=renewing(found.log, forecasts, "method"),
    )
    # only now: limits and worked examples are those of all questions, whichever are asked
    lab = dataclasses.replace(lab, corpus=asking)
    for name in names:
        open_method(lab, name).check()
    untrained = [name for name in names if not open_method(lab, name).is_trained]
    forecasts |= planning.of_weights(
        untrained, config, corpus, lab.model, lab.tokenizer, lab.prompts
    )
    # only now: a command that is refused leaves nothing behind
    folder = open_run(root, config.run.name, config, **where)
    values = {
        **record(config),
        "methods": config.methods,
        "runs": config.run.runs,
        "name": config.run.name,
    }
    command = command_of("experiments.compare", Compare, values)
    counts = f"{len(corpus.documents)} documents, {len(corpus.passages)} passages, {len(asking.questions)} questions"
    say(
        "compare",
        f"{corpus.name}: {counts}, {len(corpus.retention)} on other matters; writing to {folder.path}",
    )
    planning.tell("compare", forecasts, LESS)
    clear_finished(folder)
    code = environment() | {"weights": weights_hash(lab.params)}
    arms = {name: arm for name in names if (arm := load_arm(folder, name)) is not None}
    refuse_other_questions(folder, arms, corpus)
    for name in arms:
        say(name, "finished earlier")
    while pending := [name for name in names if name not in arms]:
        if arms:
            results = write_results(folder, lab, names, arms, code, command)
            # the notes come with the whole table
            so_far = dataclasses.replace(comparison_tables.quality_table(results), notes=())
            print(f"\n{table.to_markdown(so_far)}", flush=True)
        arm = run_arm(lab, pending[0], config.latency_queries, arms.get("base"), config.realign)
        arms[pending[0]] = dataclasses.replace(arm, environment=code)
        save_arm(folder, pending[0], arms[pending[0]])
    results = write_results(folder, lab, names, arms, code, command)
    print(
        f"\n{table.render(comparison_tables.main_tables(results), comparison_tables.footer(results))}"
    )
    if (told := comparison_tables.verdict(results)) is not None:
        print(told)
    highest = max(arm.cost.peak_memory_bytes or 0 for arm in arms.values())
    say("compare", f"{time.monotonic() - began:.0f} s, at most {highest / 1e9:.1f} GB")
    print(
        f"Look at {folder.path}/report.html, or at {folder.path}/predictions.jsonl for every answer."
    )
    # Values of a profile are spelled out, so that none given beside it is lost.
    trains = any(parts(name)[0] != BASE for name in names)
    one_thing = {"replay": 0.5} if trains else {"k": max(1, config.settings.retrieval.k // 2)}
    print("Next: change one thing, and put the tables side by side:")
    print(
        build.next_command("experiments.compare", Compare, config, profile="default", **one_thing)
    )
    return results


def _asking(corpus: Corpus, splits: tuple[str, ...]) -> Corpus:
    """Returns the corpus with the questions of these splits; all of them for none. Raises
    `UserError` with the nearest one for a split that nothing is asked in."""
    known = list(dict.fromkeys(question.split for question in corpus.questions))
    for split in splits:
        if split not in known:
            raise UserError(
                f"--ask: {corpus.name} asks nothing in '{split[:60]}'. {nearest(split, known)}"
            )
    if not splits:
        return corpus
    kept = tuple(question for question in corpus.questions if question.split in splits)
    return dataclasses.replace(corpus, questions=kept)


def _profile() -> dict[str, Any]:
    values = flags.FLAGS
    if values.profile not in PROFILES:
        return {}  # the configuration refuses it
    return PROFILES[values.profile]


def main() -> None:
    build.start(Compare, run, _profile)


if __name__ == "__main__":
    main()
