"""Trains a grid of LoRA adapters as lanes of one program, asks each the same questions, and prints
an ablation table.

    python -m experiments.sweep_lora --dry_run                                    what the grid is: a line a lane, nothing is run
    python -m experiments.sweep_lora                                              ranks 4 and 16, two rates, two seeds: eight lanes
    python -m experiments.sweep_lora --ranks=2,8,32 --alphas=2r --lrs=1e-3        alpha twice the rank
    python -m experiments.sweep_lora --seeds=0,1,2 --corpus=DIR --name=mine       your own documents and questions (FlashRAG's format)
    python -m experiments.sweep_lora --targets=q_proj --targets=mlp --lanes=4     two sets of kernels, four lanes at a time
    python -m experiments.sweep_lora --mesh=lane:8 --dtype=bfloat16               lanes spread over eight devices

Each lane has its own rank, alpha, learning rate, targets, seed and order of the data; all train
beside one base, in one step compiled once. A lane computes what `finetune` would compute with its
settings. --lanes is how many train at a time: by default as many as memory holds, and the reason is
printed. A lane that diverges leaves, and the others go on; with --early_stop=3 a lane also leaves
when its loss on every fifth training question, which is then held out, has not improved for three
looks.

Afterwards the adapters answer together: rows of one batch use different ones, beside the base model
as it came. The run's folder, runs/NAME, holds config.json, metrics.jsonl (a row a step and lane),
predictions.jsonl (every answer), results.json, table.md, figures (quality, retention and loss
against rank and learning rate) and lanes/LANE/adapter.safetensors. The same command again goes on
where a broken run stopped; with a larger grid it trains only what is new.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import build
from experiments.configs.compare import Compare
from experiments.configs.sweep_lora import SweepLora
from experiments.sweep_grid import grid
from experiments.sweep_lanes import BASE, TrainedLane, answer_missing, train_missing
from kafjax import hub
from kafjax.core import rundir
from kafjax.core.errors import UserError
from kafjax.core.progress import say
from kafjax.core.records import Corpus, Prediction, Question
from kafjax.core.rundir import Run, read_object, write_json, write_jsonl
from kafjax.core.schema import checked, read_rows
from kafjax.corpus import open_corpus
from kafjax.evaluation import sweep, table
from kafjax.generation import Generator
from kafjax.methods import Settings
from kafjax.methods.examples import check_texts, training_examples
from kafjax.parallel import make_mesh, n_data_shares
from kafjax.prompts.prompt import Prompts
from kafjax.training import Example, placement
from kafjax.training.checksum import weights_hash
from kafjax.training.lane import EarlyStop, Lane, check_lanes
from kafjax.training.lane_step import check_divides
from kafjax.training.loop import batches_of

HELD_OUT = 5  # with --early_stop, one training question in so many


def run(config: SweepLora) -> dict[str, Any] | None:
    """Trains the lanes that are missing, asks all, and returns the contents of results.json; None
    for a dry run.

    Raises:
      UserError: anything that the user can mend, before the first file is written wherever it can
        be known.
    """
    lanes = grid(config)
    if config.dry_run:
        for lane in lanes:
            spec = lane.spec
            print(
                f"{lane.name}: rank {spec.rank}, alpha {spec.alpha:g}, rate {lane.learning_rate:g}, seed {lane.seed}, {spec.targets}"
            )
        command = build.next_command(
            "experiments.sweep_lora", SweepLora, config, dry_run=False, name=config.run.name
        )
        print(f"{len(lanes)} lanes. Next: {command}")
        return None
    # All that can be refused is refused before anything is on disk.
    mesh = make_mesh(config.mesh)
    if config.lanes is not None:
        check_divides(config.lanes, mesh)
    corpus, tokenizer = open_corpus(config.corpus, config.seed), hub.tokenizer(config.model.model)
    config = build.with_limit(config, corpus, tokenizer, label="sweep")
    template = build.open_template(config.model.model, config.model.chat)
    where = {
        "prefix": "sweep",
        "also": build.corpus_identity(config.corpus, corpus) | build.chat_identity(template),
    }
    root, name = Path(config.run.runs), config.run.name
    rundir.find_run(root, name, config, **where)
    model, prompts = build.asked_through(
        template, build.describe_decoder(config.model, in_lanes=True), tokenizer
    )
    check_lanes(model.abstract_params(), config.train, lanes)
    check_texts(corpus, tokenizer, model.config.vocab_size)
    examples, stop = examples_of(config, corpus, tokenizer, model.config.text_end, prompts)
    batches_of(examples, config.train, n_data_shares(mesh))
    stored = build.abstract_params(config.model, model)
    params = build.load_weights(
        config.model, placement(model, config.train, mesh, lanes[0].spec, stored)
    )
    run = rundir.open_run(root, name, config, **where)
    n_questions = len(corpus.questions) + len(corpus.retention)
    say(
        "sweep",
        f"{corpus.name}: {len(lanes)} lanes, {n_questions} questions each; writing to {run.path}",
    )
    code = rundir.environment() | {"weights": weights_hash(params)}
    train_missing(
        run,
        model,
        params,
        examples,
        config.train,
        lanes,
        mesh=mesh,
        stop=stop,
        slots=config.lanes,
        code=code,
    )
    generator = Generator(
        model, tokenizer, config.generation.batch, mesh, config.generation.batch_tokens
    )
    answer_missing(
        run,
        generator,
        params,
        corpus,
        lanes,
        config.generation.limit,
        build.suited(prompts, build.asked_of(corpus)),
    )
    results = write_results(run, lanes)
    print(f"\n{table.render([sweep.ablation_table(results['cells'])], [])}")
    print(f"Look at {run.path}/figures, or at {run.path}/predictions.jsonl for every answer.")
    if (winner := sweep.best(results["cells"])) is None:
        print("Next: every lane diverged; try lower --lrs.")
        return results
    best = winner["settings"]
    values = {"rank": best["rank"], "alpha": best["alpha"], "lr_lora": best["learning rate"]}
    # lanes are an axis that only a sweep has
    values |= {"targets": best.get("targets", config.targets[0]), "mesh": None}
    print("Next: see the best cell beside retrieval and full fine-tuning, and what it forgets:")
    print(build.next_command("experiments.compare", Compare, config, **values))
    return results


def examples_of(
    config: SweepLora, corpus: Corpus, tokenizer: Any, eos_id: int, prompts: Prompts
) -> tuple[list[list[Example]], EarlyStop | None]:
    """Returns the examples that lanes train on, and with --early_stop those that they are watched
    on."""
    settings = Settings(replay=config.replay, document_parts=config.corpus.document_parts)
    held_out: Sequence[Question] = (
        corpus.training_questions[HELD_OUT - 1 :: HELD_OUT] if config.early_stop else ()
    )
    if config.early_stop and not held_out:
        raise UserError(
            f"--early_stop watches every {HELD_OUT}th training question, and there are {len(corpus.training_questions)}"
        )
    kept = tuple(question for question in corpus.training_questions if question not in held_out)
    examples = training_examples(
        dataclasses.replace(corpus, training_questions=kept), tokenizer, settings, eos_id, prompts
    )
    if not config.early_stop:
        return examples, None
    alone = dataclasses.replace(
        corpus,
        documents=(),
        training_questions=tuple(held_out),
        replay_texts=(),
        replay_questions=(),
    )
    return examples, EarlyStop(
        training_examples(alone, tokenizer, Settings(), eos_id, prompts)[0],
        config.look_every,
        config.early_stop,
    )


def write_results(run: Run, lanes: Sequence[Lane]) -> dict[str, Any]:
    """Puts the lanes together: results.json, predictions.jsonl, table.md and the figures."""
    folder = run.file("lanes")

    def predictions(name: str) -> list[Prediction]:
        file = folder / name / "predictions.jsonl"
        return (
            read_rows(Prediction, file, fix=f"delete {file} to answer again")
            if file.exists()
            else []
        )

    trained = {lane.name: read_object(folder / lane.name / "trained.json") for lane in lanes}
    several = len({lane.spec.targets for lane in lanes}) > 1

    def trial(lane: Lane) -> sweep.Trial:
        settings = {
            "rank": lane.spec.rank,
            "alpha": lane.spec.alpha,
            "learning rate": lane.learning_rate,
        }
        settings |= {"targets": lane.spec.targets} if several else {}
        again = f"delete {folder / lane.name} to train it again"
        kept = checked(
            TrainedLane, trained[lane.name], folder / lane.name / "trained.json", fix=again
        )
        return sweep.Trial(
            lane.name, settings, lane.seed, kept.ending, kept.final_loss, predictions(lane.name)
        )

    trials = [trial(lane) for lane in lanes]
    results = {
        "cells": [sweep.base_cell(predictions(BASE)), *sweep.cells(trials)],
        "lanes": trained,
        "config": read_object(run.file("config.json")),
        "environment": rundir.environment(),
    }
    write_json(run.file("results.json"), results)
    write_jsonl(
        run.file("predictions.jsonl"),
        [p.to_json() for name in (BASE, *trained) for p in predictions(name)],
    )
    rundir.write_atomic(
        run.file("table.md"), table.render([sweep.ablation_table(results["cells"])], [])
    )
    sweep.draw(results["cells"], run.file("figures"))
    return results


def main() -> None:
    build.start(SweepLora, run)


if __name__ == "__main__":
    main()
