"""Fine-tunes a language model on a corpus: all of its weights, or a LoRA adapter.

    python -m experiments.finetune                                   a LoRA adapter for invented biographies
    python -m experiments.finetune --method=full --epochs=6          all weights of the blocks instead
    python -m experiments.finetune --corpus=DIR --name=mine          your own documents and questions (FlashRAG's format)
    python -m experiments.finetune --rank=64 --lr=3e-4 --wandb=offline     other settings, mirrored to a wandb run
    python -m experiments.finetune --dora --init=pissa --lora_plus=8 variants of LoRA, which go together (docs/lora.md)
    python -m experiments.finetune --targets=attention --rank_pattern='q_proj:32' --train_also='norm/scale'     more of one, less of another
    python -m experiments.finetune --base=nf4                        an adapter beside a base of 4-bit integers (docs/quantized.md)
    python -m experiments.finetune --mesh=data:2,fsdp:4 --dtype=bfloat16 --batch_rows=64     on eight devices

An epoch reads every document (of a generated corpus, one telling of every fact) and every training
question; rows are packed to --seq_len tokens. Learning rates: LoRA's best one is about ten times
that of full fine-tuning. Out of memory? Keep --batch_rows and raise --accumulate, which computes a
step in so many parts. The model forgets what it does not see: --replay mixes other matters in.

On many hosts start the same command on each, under srun, in a Kubernetes Job or on all hosts of a
TPU slice (docs/scale.md), with --runs in a folder that all of them see, which may be in a bucket
(--runs=gs://BUCKET/runs, docs/launch.md). SIGTERM saves, and exits with 143.

The run's folder, runs/NAME, holds config.json, metrics.jsonl (a row a step), loss.png, result.json
(what it took) and what was learned: adapter.safetensors, or weights.safetensors with the trained
weights. The same command again goes on where a broken run stopped: same data, same losses.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from tokenizers import Tokenizer

from experiments import build, planning
from experiments.configs.compare import Compare
from experiments.configs.finetune import Finetune
from experiments.configs.shared import FLOAT
from kafjax import hub, lora
from kafjax.core import trees
from kafjax.core.config_record import config_hash, record
from kafjax.core.errors import UserError
from kafjax.core.paths import as_path
from kafjax.core.progress import say
from kafjax.core.records import Question
from kafjax.core.rundir import Run, environment, find_run, open_run, write_atomic, write_json
from kafjax.core.schema import read
from kafjax.core.text import visible
from kafjax.corpus import open_corpus
from kafjax.evaluation.figures import loss_curves
from kafjax.generation import Generator, Sampling
from kafjax.lora.files import ADAPTER
from kafjax.methods import Settings
from kafjax.methods.examples import check_texts, training_examples
from kafjax.models import Decoder
from kafjax.parallel import distributed, shard, shardings
from kafjax.prompts.prompt import Prompts
from kafjax.training import (
    Example,
    TrainResult,
    check_training,
    discard_checkpoints,
    placement,
    train,
)
from kafjax.training.checksum import weights_hash
from kafjax.training.forecast import forecast, measure, renewing
from kafjax.training.loop import refuse_checkpoints
from kafjax.training.packed import PackedRows, tokenizer_checksum
from kafjax.training.took import Took
from kafjax.training.track import Track, tracker

N_SHOWN = 3  # questions asked at the end


def run(config: Finetune) -> None:
    """Trains, resuming what an earlier start of the same run has done, and shows some answers.

    Raises:
      UserError: anything that the user can mend, before the first file is written wherever it can
        be known.
      Preempted: SIGTERM came; what there was to save is saved.
    """
    p = config.processes
    with distributed.processes(p.coordinator, p.num_processes, p.process_id, p.start_timeout):
        _finetune(config.resolved())


def _finetune(config: Finetune) -> None:
    # All that can be refused is refused before anything is on disk.
    spec = config.spec if config.method == "lora" else None
    if spec is None and config.model.base != FLOAT:
        raise UserError(
            f"--method=full trains the kernels, which --base={config.model.base} stores as integers; use --method=lora or --base={FLOAT}"
        )
    refuse_checkpoints(as_path(config.run.runs), config.train)
    train_config = dataclasses.replace(config.train, learning_rate=config.lr)
    template, tokenizer = (
        build.open_template(config.model.model, config.model.chat),
        hub.tokenizer(config.model.model),
    )
    model, prompts = build.asked_through(template, build.describe_decoder(config.model), tokenizer)
    mesh = build.open_mesh(config.mesh, model, train_config, spec, label="finetune")
    chat = build.chat_identity(template)
    lesson = open_lesson(config, model, tokenizer, prompts, chat)
    examples = lesson.examples
    check_training(model, model.abstract_params(), examples, train_config, spec=spec, mesh=mesh)
    expected = {
        config.method: forecast(
            model, examples, train_config, mesh, measure(model, train_config, mesh), spec
        )
    }
    if config.budget is not None:
        if jax.process_count() > 1:
            raise UserError(
                "--budget is for one process: many would not measure the same speed; give --steps"
            )
        return _finetune(planning.within(config, config.budget, expected, label="finetune"))
    params = build.load_weights(
        config.model,
        placement(model, train_config, mesh, spec, build.abstract_params(config.model, model)),
    )
    where = {"prefix": f"finetune-{config.method}", "also": {**lesson.identity, **chat}}
    opened = open_run if distributed.is_main() else find_run
    run = distributed.together(
        lambda: opened(as_path(config.run.runs), config.run.name, config, **where)
    )
    # before a full training takes them over
    code = environment() | {"weights": weights_hash(params)}
    finished = distributed.of_main(run.file("result.json").exists())
    mode = config.wandb if distributed.is_main() and not finished else "off"
    with tracker(run.path, mode, record(config)) as track:
        if finished:
            if distributed.is_main():
                discard_checkpoints(run.path)  # of a start that ended in between
            say("finetune", f"finished earlier; delete {run.path} to train again")
        else:
            say("finetune", f"{lesson.told}; writing to {run.path}")
            planning.tell("finetune", expected, "for less of it: --budget=10m, --epochs or --steps")

            def log(**row: Any) -> None:
                run.log(method=config.method, **row)
                track(**row)

            renewed = renewing(log, expected, "label")
            kept = {"run_dir": run.path, "log": renewed, "label": config.method}
            result = train(
                model, params, examples, train_config, spec=spec, mesh=mesh, donate=True, **kept
            )
            save_result(run, config.method, code, result, track)
        distributed.wait_for_all("saved")
        learned = _learned(run, config.method, model, params, mesh)
        asking = Generator(model, tokenizer, mesh=mesh), learned, lesson.questions
        shown = _ask(*asking, build.suited(prompts, lesson.questions))
        track.table("answers", ("question", "model", "answer"), shown)
    if distributed.is_main():
        _show(config, run, shown)


@dataclasses.dataclass(frozen=True)
class Lesson:
    """Training data, the questions that test it afterwards, its part of the run's identity, and a
    line that describes it."""

    examples: list[list[Example]] | PackedRows
    questions: Sequence[Question]
    identity: Mapping[str, str]
    told: str


def open_lesson(
    config: Finetune,
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Prompts,
    chat: Mapping[str, str],
) -> Lesson:
    """Opens what a training reads: its rows on disk, or its corpus. Raises `UserError` for what
    cannot be trained on."""
    return (
        _open_corpus(config, model, tokenizer, prompts)
        if config.rows is None
        else _open_rows(config, tokenizer, chat)
    )


def _open_corpus(
    config: Finetune, model: Decoder, tokenizer: Tokenizer, prompts: Prompts
) -> Lesson:
    corpus = open_corpus(config.corpus, config.train.seed)
    check_texts(corpus, tokenizer, model.config.vocab_size)
    settings = Settings(replay=config.replay, document_parts=config.corpus.document_parts)
    examples = training_examples(corpus, tokenizer, settings, model.config.text_end, prompts)
    told = f"{corpus.name}: {len(corpus.documents)} documents, {len(corpus.training_questions)} training questions"
    return Lesson(examples, corpus.questions, build.corpus_identity(config.corpus, corpus), told)


def _open_rows(config: Finetune, tokenizer: Tokenizer, chat: Mapping[str, str]) -> Lesson:
    """Opens rows that were packed beforehand. The corpus that they were made from is not read: it
    may not fit into memory."""
    if config.replay:
        raise UserError("--replay does not go with --rows, which were packed without other matters")
    rows = PackedRows.open(Path(config.rows))
    about = rows.about
    if about.tokenizer != tokenizer_checksum(tokenizer):
        raise UserError(
            f"{rows.folder} was packed with another tokenizer than that of {config.model.model}"
        )
    if about.chat_template != chat.get(build.CHAT_TEMPLATE):
        raise UserError(
            f"{rows.folder} was packed with another --chat, or another chat template, than that of {config.model.model}"
        )
    # Folders of older releases have no questions; runs on them have no hash of the rows, and go on
    # without.
    identity = (
        {}
        if about.questions is None
        else {build.CORPUS_HASH: config_hash(dataclasses.asdict(about))}
    )
    return Lesson(
        rows,
        rows.questions(),
        identity,
        f"{about.corpus}: {about.rows} rows of {about.seq_len} tokens in {rows.folder}",
    )


def save_result(
    run: Run, method: str, code: dict[str, Any], result: TrainResult, track: Track
) -> None:
    """Writes what was learned and what it took, `result.json` last, and drops the checkpoints."""
    if result.spec is None:
        hub.save_trained(run.path, result.trainable)
    else:
        adapters = distributed.to_host(result.trainable)
        if distributed.is_main():
            lora.save(run.file(ADAPTER), adapters, result.spec)
    if not distributed.is_main():
        return
    png = io.BytesIO()
    loss_curves({**row, "method": method} for row in result.curve).savefig(png, format="png")
    write_atomic(run.file("loss.png"), png.getvalue())
    track.figure("loss", png.getvalue())
    track.summary(result.record())
    write_json(run.file("result.json"), {**result.record(), "environment": code})
    discard_checkpoints(run.path)


def _learned(run: Run, method: str, model: Decoder, params: trees.Tree, mesh: Mesh) -> trees.Tree:
    """Reads what the run has learned into the model's parameters, from disk: what is shown is what
    was saved."""
    if method == "full":
        return hub.load_trained(run.path, params)
    adapters, spec = lora.load(run.file(ADAPTER), params)
    return lora.attach(
        params, shard(adapters, shardings(lora.axes(adapters, model.axes()), adapters, mesh)), spec
    )


def _ask(
    generator: Generator, params: trees.Tree, questions: Sequence[Question], write: Prompts
) -> list[tuple[str, str, str]]:
    """Asks some of the questions. Returns each with the reply and an accepted answer."""
    asked = questions[:: max(len(questions) // N_SHOWN, 1)][:N_SHOWN]
    prompts = [write.closed_book_prefix() + write.closed_book(question.text) for question in asked]
    replies = generator.generate(params, prompts, Sampling(max_new_tokens=12))
    return [
        (question.text, reply.text.strip(), question.answers[0])
        for question, reply in zip(asked, replies, strict=True)
    ]


def _show(config: Finetune, run: Run, shown: Sequence[tuple[str, str, str]]) -> None:
    took = read(Took, run.file("result.json"), fix=f"delete {run.path} to train again")
    print(
        f"\nTrained {took.trainable_parameters:,} parameters for {took.steps} steps on {took.tokens:,} tokens"
    )
    print(
        f"  in {took.seconds:.0f} s ({took.tokens_per_second:.0f} tokens/s), compiled in {took.compile_seconds:.0f} s;"
    )
    loss = "" if took.final_loss is None else f", final loss {took.final_loss:.3f} nats per token"
    print(f"  {took.peak_memory_bytes / 1e9:.1f} GB at the peak{loss}.")
    if took.flops_useful is not None:
        executed, useful = took.flops_measured / 1e12, took.flops_useful / 1e12
        print(
            f"  {executed:.3g} TFLOPs executed, {useful:.3g} of them useful: the rest are loss places without a target."
        )
    for texts in shown:
        asked, said, known = map(visible, texts)
        print(f"\n  {asked}\n    model:  {said}\n    answer: {known}")
    print(
        f"\nLook at {run.path}/loss.png. If the loss still falls at the end, train longer (--epochs); if it jumps, lower --lr."
    )
    print(f"Next: ask it more with python -m experiments.answer --run={run.path},")
    if config.rows is None:
        values: dict[str, Any] = {"methods": ("base", "rag", config.method)}
        values[f"lr_{config.method}"] = config.lr
        print("or see what training buys, costs and forgets beside retrieval:")
        print(build.next_command("experiments.compare", Compare, config, budget=None, **values))


def main() -> None:
    build.start(Finetune, run)


if __name__ == "__main__":
    main()
