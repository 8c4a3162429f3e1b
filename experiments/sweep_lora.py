"""Trains a grid of LoRA adapters as lanes of one program, asks each the same questions, and prints an ablation table.

    python -m experiments.sweep_lora --dry_run                                    what the grid is: a line a lane, nothing is run
    python -m experiments.sweep_lora                                              ranks 4 and 16, two rates, two seeds: eight lanes
    python -m experiments.sweep_lora --ranks=2,8,32 --alphas=2r --lrs=1e-3        alpha twice the rank
    python -m experiments.sweep_lora --seeds=0,1,2 --corpus=DIR --name=mine       your own documents and questions (FlashRAG's format)
    python -m experiments.sweep_lora --targets=q_proj --targets=mlp --lanes=4     two sets of kernels, four lanes at a time
    python -m experiments.sweep_lora --mesh=lane:8 --dtype=bfloat16               lanes spread over eight devices

Each lane has its own rank, alpha, learning rate, targets, seed and order of the data; all train beside one base, in one step compiled
once. A lane computes what `finetune` would compute with its settings. --lanes is how many train at a time: by default as many as memory
holds, and the reason is printed. A lane that diverges leaves, and the others go on; with --early_stop=3 a lane also leaves when its loss
on every fifth training question, which is then held out, has not improved for three looks.

Afterwards the adapters answer together: rows of one batch use different ones, beside the base model as it came. The run's folder,
runs/NAME, holds config.json, metrics.jsonl (a row a step and lane), predictions.jsonl (every answer), results.json, table.md, figures
(quality, retention and loss against rank and learning rate) and lanes/LANE/adapter.safetensors. The same command again goes on where
a broken run stopped; with a larger grid it trains only what is new.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments import common
from kafjax import hub, lora
from kafjax.core import rundir, trees
from kafjax.core.errors import UserError, run_main
from kafjax.core.progress import Progress, say, waiting
from kafjax.core.records import Corpus, Prediction, Question, prediction_from_json
from kafjax.core.rundir import Run, read_json, read_jsonl, write_json, write_jsonl
from kafjax.evaluation import sweep, table
from kafjax.evaluation.score import score
from kafjax.generation import Generation, Generator, Sampling
from kafjax.methods import Settings
from kafjax.methods.examples import training_examples
from kafjax.models import REMAT, Decoder
from kafjax.parallel import make_mesh, n_data_shares
from kafjax.retrieval import prompt
from kafjax.training import Example, TrainConfig, discard_checkpoints, layout
from kafjax.training.checksum import weights_hash
from kafjax.training.lane_step import LaneTask, check_lanes, lanes_that_fit
from kafjax.training.lanes import EarlyStop, Lane, LaneResult, check, train_lanes
from kafjax.training.loop import batches_of

BASE = "base"
HELD_OUT = 5  # with --early_stop, one training question in so many

common.define_corpus_flags()
common.define_base_flag()
flags.adopt_module_key_flags(common)
flags.DEFINE_string("model", "gemma3-270m", "Language model: gemma3-270m, or a folder of one of the families in docs/models.md.")
flags.DEFINE_list("ranks", ["4", "16"], "Grid: ranks, separated by commas.")
flags.DEFINE_list("alphas", ["32"], "Grid: alphas; 2r is twice the rank. The update is scaled by alpha / rank.")
flags.DEFINE_list("lrs", ["3e-4", "1e-3"], "Grid: peak learning rates.")
flags.DEFINE_list("seeds", ["0", "1"], "Grid: seeds of the adapter's start and of the order of the data.")
flags.DEFINE_multi_string("targets", [lora.Spec().targets], "Grid: kernels to adapt, by a regular expression; may be repeated.")
flags.DEFINE_boolean("rslora", False, "Scale by alpha / sqrt(rank) instead (rsLoRA).")
flags.DEFINE_integer("lanes", None, "Lanes that train at a time (default: as many as memory holds).", lower_bound=1)
flags.DEFINE_integer("epochs", 8, "Passes over the corpus.", lower_bound=1)
flags.DEFINE_integer("steps", None, "Optimizer steps, instead of --epochs.", lower_bound=1)
flags.DEFINE_integer("early_stop", 0, "Looks without improvement after which a lane leaves; 0: none does.", lower_bound=0)
flags.DEFINE_integer("look_every", 10, "Steps between two looks of --early_stop.", lower_bound=1)
flags.DEFINE_float("replay", 0.0, "Share of examples about other matters mixed in, 0 to 1. It softens forgetting.")
flags.DEFINE_integer("batch_rows", 2, "Rows of packed tokens per step of each lane.", lower_bound=1)
flags.DEFINE_integer("seq_len", 128, "Tokens per row.", lower_bound=2)
flags.DEFINE_enum("dtype", "float32", list(common.DTYPES), "Type of activations. What trains is kept in float32 either way.")
flags.DEFINE_enum("remat", "none", REMAT, common.REMAT_HELP)
flags.DEFINE_string("mesh", "auto", "Devices by axis, such as lane:4,fsdp:2. auto: all on fsdp.")
flags.DEFINE_integer("checkpoint_every", 50, "Steps between checkpoints of each lane; 0 for none.", lower_bound=0)
flags.DEFINE_integer("max_new_tokens", 12, "Longest answer in tokens.", lower_bound=1)
flags.DEFINE_integer("batch", 32, "Questions answered at a time.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Seed of the generated corpus.")
flags.DEFINE_boolean("dry_run", False, "List the lanes and stop.")
flags.DEFINE_string("name", None, "Name of the run's folder (default: a hash of the configuration without the grid).")
flags.DEFINE_string("runs", "runs", "Folder that runs are written to.")

# What a lane's result depends on beside the grid: lanes of one folder share it.
_IDENTITY = (
    *("model", "rslora", "epochs", "steps", "early_stop", "look_every", "replay", "batch_rows", "seq_len", "dtype", "seed"),
    "max_new_tokens",
)


def main(_: list[str]) -> None:
    values = flags.FLAGS
    lanes = grid()
    train_config = TrainConfig(
        epochs=values.epochs,
        steps=values.steps,
        batch_rows=values.batch_rows,
        seq_len=values.seq_len,
        loss_chunk=512,
        remat=values.remat,
        checkpoint_every=values.checkpoint_every,
    )
    if values.dry_run:
        for lane in lanes:
            spec = lane.spec
            print(f"{lane.name}: rank {spec.rank}, alpha {spec.alpha:g}, rate {lane.learning_rate:g}, seed {lane.seed}, {spec.targets}")
        print(f"{len(lanes)} lanes. Next: the same command without --dry_run trains them.")
        return
    # All that can be refused is refused before anything is on disk.
    mesh = make_mesh(values.mesh)
    if values.lanes is not None:
        check_lanes(values.lanes, mesh)
    corpus = common.corpus_from_flags()
    config = {**common.config_from_flags(*_IDENTITY), **common.corpus_identity(corpus)}
    where = Path(values.runs), values.name or f"sweep-{rundir.config_hash(config)}", config
    rundir.find_run(*where)
    model, tokenizer = common.describe_decoder(), hub.tokenizer(values.model)
    check(model.abstract_params(), train_config, lanes)
    examples, stop = examples_of(corpus, tokenizer, model.config.eos_id)
    batches_of(examples, train_config, n_data_shares(mesh))
    params = common.load_weights(layout(model, train_config, mesh, lanes[0].spec))
    run = rundir.open_run(*where)
    n_questions = len(corpus.questions) + len(corpus.retention)
    say("sweep", f"{corpus.name}: {len(lanes)} lanes, {n_questions} questions each; writing to {run.path}")
    code = rundir.environment() | {"weights": weights_hash(params)}
    train_missing(run, model, params, examples, train_config, lanes, mesh, stop, code)
    answer_missing(run, Generator(model, tokenizer, values.batch, mesh), params, corpus, lanes)
    results = write_results(run, lanes)
    print(f"\n{table.render([sweep.ablation_table(results['cells'])], [])}")
    print(f"Look at {run.path}/figures, or at {run.path}/predictions.jsonl for every answer.")
    if (winner := sweep.best(results["cells"])) is None:
        print("Next: every lane diverged; try lower --lrs.")
        return
    s = winner["settings"]
    print("Next: see the best cell beside retrieval and full fine-tuning, and what it forgets:")
    print(f"python -m experiments.compare --rank={s['rank']} --alpha={s['alpha']:g} --lr_lora={s['learning rate']:g}")


def grid() -> list[Lane]:
    """Every combination of the grid's flags. Raises `UserError` for an empty one or a value that is none."""
    values = flags.FLAGS
    ranks, rates, seeds = _numbers("ranks", int), _numbers("lrs", float), _numbers("seeds", int)
    alphas, targets = _list("alphas"), list(dict.fromkeys(values.targets))
    lanes = []
    for rank, alpha, rate, (t, target), seed in itertools.product(ranks, alphas, rates, enumerate(targets), seeds):
        spec = lora.Spec(rank, _alpha(alpha, rank), target, rslora=values.rslora)
        name = f"r{rank}-a{spec.alpha:g}-lr{rate:g}" + (f"-{_plain(target)}{t}" if len(targets) > 1 else "") + f"-s{seed}"
        lanes.append(Lane(name, spec, rate, seed))
    return list({lane.name: lane for lane in lanes}.values())  # 2r and 8 are the same alpha at rank 4


def _plain(target: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", target).strip("_")[:20]


def _list(name: str) -> list[str]:
    given = [text.strip() for text in flags.FLAGS[name].value if text.strip()]
    if not given:
        raise UserError(f"--{name} is empty: the grid has no lane; give at least one value")
    return list(dict.fromkeys(given))


def _numbers(name: str, kind: Callable[[str], Any]) -> list[Any]:
    return [_number(name, text, kind) for text in _list(name)]


def _number(name: str, text: str, kind: Callable[[str], Any]) -> Any:
    try:
        return kind(text)
    except ValueError:
        whole = "a whole number" if kind is int else "a number"
        raise UserError(f"--{name}: '{text}' is not {whole}") from None


def _alpha(text: str, rank: int) -> float:
    return _number("alphas", text.removesuffix("r") or "1", float) * (rank if text.endswith("r") else 1)


def examples_of(corpus: Corpus, tokenizer: Any, eos_id: int) -> tuple[list[list[Example]], EarlyStop | None]:
    """What lanes train on, and with --early_stop what they are watched on."""
    values = flags.FLAGS
    settings = Settings(replay=values.replay, document_parts=common.document_parts())
    held_out: Sequence[Question] = corpus.training_questions[HELD_OUT - 1 :: HELD_OUT] if values.early_stop else ()
    if values.early_stop and not held_out:
        raise UserError(f"--early_stop watches every {HELD_OUT}th training question, and there are {len(corpus.training_questions)}")
    kept = tuple(question for question in corpus.training_questions if question not in held_out)
    examples = training_examples(dataclasses.replace(corpus, training_questions=kept), tokenizer, settings, eos_id)
    if not values.early_stop:
        return examples, None
    alone = dataclasses.replace(corpus, documents=(), training_questions=tuple(held_out), replay_texts=(), replay_questions=())
    return examples, EarlyStop(training_examples(alone, tokenizer, Settings(), eos_id)[0], values.look_every, values.early_stop)


def train_missing(
    run: Run,
    model: Decoder,
    params: trees.Tree,
    examples: list[list[Example]],
    config: TrainConfig,
    lanes: Sequence[Lane],
    mesh: Any,
    stop: EarlyStop | None,
    code: dict[str, Any],
) -> None:
    """Trains the lanes that have left no `trained.json`, and saves each as soon as it is done. `code` is noted as their environment."""
    folder = run.file("lanes")
    for record in folder.glob("*/trained.json"):
        discard_checkpoints(record.parent)  # of a start that ended in between
    pending = [lane for lane in lanes if not (folder / lane.name / "trained.json").exists()]
    if len(pending) < len(lanes):
        say("sweep", f"{len(lanes) - len(pending)} lanes were trained earlier")
    if not pending:
        return
    layout = lora.lanes.layout([lane.spec for lane in lanes], params)
    slots = flags.FLAGS.lanes
    if slots is None:
        batch = batches_of(examples, dataclasses.replace(config, seed=pending[0].seed), n_data_shares(mesh))[0]
        with waiting("sweep", "asking the compiler how many lanes memory holds"):
            slots, why = lanes_that_fit(LaneTask.build(model, params, config, mesh, layout, mesh.shape["lane"]), batch, len(pending))
        say("sweep", f"{slots} lanes at a time: {why}")

    def save(lane: Lane, result: LaneResult) -> None:
        last = [row["loss"] for row in result.curve[-max(len(result.curve) // 10, 1) :]]
        if result.ending != "diverged":  # its adapter is of no use, and holds NaN
            lora.save(folder / lane.name / "adapter.safetensors", result.adapters, lane.spec)
        write_json(
            folder / lane.name / "trained.json",
            {
                "rank": lane.spec.rank,
                "alpha": lane.spec.alpha,
                "learning_rate": lane.learning_rate,
                "targets": lane.spec.targets,
                "seed": lane.seed,
                "ending": result.ending,
                "steps": len(result.curve),
                "tokens": result.tokens,
                "final_loss": float(np.mean(last)) if np.isfinite(last).all() else None,
                "checks": result.checks,
                "environment": code,
            },
        )
        discard_checkpoints(folder / lane.name)

    kept = {"early_stop": stop, "run_dir": folder, "on_done": save, "log": run.log}
    train_lanes(model, params, examples, config, pending, slots=slots, layout=layout, mesh=mesh, **kept)


def answer_missing(run: Run, generator: Generator, params: trees.Tree, corpus: Corpus, lanes: Sequence[Lane]) -> None:
    """The adapters that have not answered yet do so, many in one batch; so does the base, from a slot that is empty."""
    questions, folder = [*corpus.questions, *corpus.retention], run.file("lanes")
    missing = lambda name: not (folder / name / "predictions.jsonl").exists()  # noqa: E731
    served = [lane for lane in lanes if (folder / lane.name / "adapter.safetensors").exists()]
    pending: list[Lane | None] = [lane for lane in served if missing(lane.name)] + ([None] if missing(BASE) else [])
    if not pending:
        return
    layout = lora.lanes.layout([lane.spec for lane in lanes], params)
    n_slots = min(len(served) + 1, 8)  # not of `pending`: a resumed run finds its programs in the compilation cache
    slots = lora.lanes.empty_slots(params, layout, n_slots)
    prompts, sampling = [prompt.closed_book(q.text) for q in questions], Sampling(max_new_tokens=flags.FLAGS.max_new_tokens)
    with Progress("answers", len(pending) * len(questions), unit="question") as bar:
        for start in range(0, len(pending), n_slots):
            group = pending[start : start + n_slots]
            for slot, lane in enumerate(group):
                adapters, spec = lora.load(folder / lane.name / "adapter.safetensors", params) if lane else ({}, lanes[0].spec)
                slots = lora.lanes.put(slots, slot, lora.lanes.pad(adapters, layout), lora.lanes.scales(spec, params, layout))
            prefix = generator.prefix(slots, prompt.closed_book_prefix())
            of_prompts = [slot for slot in range(len(group)) for _ in prompts]
            replies = generator.generate(slots, prompts * len(group), sampling, prefix, lambda n: bar.advance(n), of_prompts)
            for slot, lane in enumerate(group):
                name = lane.name if lane else BASE
                of_lane = replies[slot * len(prompts) : (slot + 1) * len(prompts)]
                rows = [_prediction(name, question, reply).to_json() for question, reply in zip(questions, of_lane, strict=True)]
                write_jsonl(folder / name / "predictions.jsonl", rows)


def _prediction(name: str, question: Question, reply: Generation) -> Prediction:
    return score(
        Prediction(
            id=question.id,
            method=name,
            split=question.split,
            question=question.text,
            answer=reply.text.strip(),
            answers=question.answers,
            gold_passages=question.passages,
            prompt_tokens=reply.prompt_tokens,
            cached_tokens=reply.cached_tokens,
            output_tokens=reply.output_tokens,
            seconds={"prefill": reply.prefill_seconds, "decode": reply.decode_seconds},
        )
    )


def write_results(run: Run, lanes: Sequence[Lane]) -> dict[str, Any]:
    """Puts the lanes together: results.json, predictions.jsonl, table.md and the figures."""
    folder = run.file("lanes")

    def predictions(name: str) -> list[Prediction]:
        file = folder / name / "predictions.jsonl"
        return [prediction_from_json(row) for row in read_jsonl(file)] if file.exists() else []

    trained = {lane.name: read_json(folder / lane.name / "trained.json") for lane in lanes}
    several = len({lane.spec.targets for lane in lanes}) > 1

    def trial(lane: Lane) -> sweep.Trial:
        settings = {"rank": lane.spec.rank, "alpha": lane.spec.alpha, "learning rate": lane.learning_rate}
        settings |= {"targets": lane.spec.targets} if several else {}
        record = trained[lane.name]
        return sweep.Trial(lane.name, settings, lane.seed, record["ending"], record["final_loss"], predictions(lane.name))

    trials = [trial(lane) for lane in lanes]
    results = {
        "cells": [sweep.base_cell(predictions(BASE)), *sweep.cells(trials)],
        "lanes": trained,
        "config": read_json(run.file("config.json")),
        "environment": rundir.environment(),
    }
    write_json(run.file("results.json"), results)
    write_jsonl(run.file("predictions.jsonl"), [p.to_json() for name in (BASE, *trained) for p in predictions(name)])
    rundir.write_atomic(run.file("table.md"), table.render([sweep.ablation_table(results["cells"])], []))
    sweep.draw(results["cells"], run.file("figures"))
    return results


if __name__ == "__main__":
    run_main(main)
