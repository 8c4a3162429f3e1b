"""Fine-tunes a language model on a corpus: all of its weights, or a LoRA adapter.

    python -m experiments.finetune                                   a LoRA adapter for invented biographies
    python -m experiments.finetune --method=full --epochs=6          all weights of the blocks instead
    python -m experiments.finetune --corpus=DIR --name=mine          your own documents and questions (FlashRAG's format)
    python -m experiments.finetune --rank=64 --lr=3e-4 --wandb       other settings, mirrored to an offline wandb run
    python -m experiments.finetune --dora --init=pissa --lora_plus=8 variants of LoRA, which go together (docs/lora.md)
    python -m experiments.finetune --targets=attention --rank_pattern='q_proj:32' --train_also='norm/scale'     more of one, less of another
    python -m experiments.finetune --base=nf4                        an adapter beside a base of 4-bit integers (docs/quantized.md)
    python -m experiments.finetune --mesh=data:2,fsdp:4 --dtype=bfloat16 --batch_rows=64     on eight devices

An epoch reads every document (of a generated corpus, one telling of every fact) and every training question; rows are packed to
--seq_len tokens. Learning rates: LoRA's best one is about ten times that of full fine-tuning. Out of memory? Keep --batch_rows and
raise --accumulate, which computes a step in so many parts. The model forgets what it does not see: --replay mixes other matters in.

On many hosts start the same command on each, under srun, in a Kubernetes Job or on all hosts of a TPU slice (docs/scale.md), with
--runs in a folder that all of them see. SIGTERM saves, and exits with 143.

The run's folder, runs/NAME, holds config.json, metrics.jsonl (a row a step), loss.png, result.json (what it took) and what was
learned: adapter.safetensors, or weights.safetensors with the trained weights. The same command again goes on where a broken run
stopped: same data, same losses.
"""

from __future__ import annotations

import dataclasses
import io
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from jax.sharding import Mesh
from tokenizers import Tokenizer

from experiments import common, processes
from kafjax import hub, lora
from kafjax.core import trees
from kafjax.core.errors import UserError, run_main
from kafjax.core.progress import say
from kafjax.core.records import Corpus, Question
from kafjax.core.rundir import Run, config_hash, environment, find_run, open_run, read_json, write_atomic, write_json
from kafjax.evaluation.figures import loss_curves
from kafjax.generation import Generator, Sampling
from kafjax.methods import Settings
from kafjax.methods.examples import training_examples
from kafjax.models import REMAT, Decoder
from kafjax.ops.attention import ATTENTION
from kafjax.parallel import distributed, shard, shardings
from kafjax.retrieval import prompt
from kafjax.training import Example, TrainConfig, TrainResult, check, discard_checkpoints, layout, train
from kafjax.training.checksum import weights_hash
from kafjax.training.optimizers import OPTIMIZERS
from kafjax.training.packed import PackedRows
from kafjax.training.track import tracker

ADAPTER = "adapter.safetensors"
LEARNING_RATE = {"full": 1e-4, "lora": 1e-3}
_INITS = ("default", *(name for name in lora.INITS if name != "lora"))
N_SHOWN = 3  # questions asked at the end

common.define_corpus_flags()
common.define_base_flag()
flags.adopt_module_key_flags(common)
flags.adopt_module_key_flags(processes)
flags.DEFINE_string("model", "gemma3-270m", "Language model: gemma3-270m, or a folder of one of the families in docs/models.md.")
flags.DEFINE_enum("method", "lora", list(LEARNING_RATE), "What to train: a LoRA adapter, or all weights.")
flags.DEFINE_float("lr", None, "Peak learning rate (default: 1e-3 for lora, 1e-4 for full).", lower_bound=0)
flags.DEFINE_integer("epochs", 12, "Passes over the corpus.", lower_bound=1)
flags.DEFINE_integer("steps", None, "Optimizer steps, instead of --epochs.", lower_bound=1)
flags.DEFINE_integer("rank", 16, "LoRA: rank of the adapter. More rank holds more facts, and costs memory.", lower_bound=1)
flags.DEFINE_float("alpha", 32.0, "LoRA: alpha; the update is scaled by alpha / rank.")
flags.DEFINE_string("targets", lora.Spec().targets, f"LoRA: regular expression found in paths to adapt, or {', '.join(lora.PRESETS)}.")
flags.DEFINE_multi_string("rank_pattern", [], "LoRA: REGEX:RANK, another rank where REGEX is found; may be repeated, the first counts.")
flags.DEFINE_multi_string("alpha_pattern", [], "LoRA: REGEX:ALPHA, likewise.")
flags.DEFINE_list("layers", None, "LoRA: numbers of the layers to adapt (default: all).")
flags.DEFINE_boolean("rslora", False, "LoRA: scale by alpha / sqrt(rank) instead; for high ranks.")
flags.DEFINE_boolean("dora", False, "LoRA: train the length of each kernel's columns apart (DoRA).")
flags.DEFINE_enum("init", "default", _INITS, "LoRA: what the adapter starts as; pissa and olora take it out of the kernels.")
flags.DEFINE_float("lora_plus", 1.0, "LoRA: b's learning rate is so many times --lr (LoRA+; 2 to 16).")
flags.DEFINE_float("dropout", 0.0, "LoRA: share of the adapters' inputs that training drops.")
flags.DEFINE_string("train_also", "", "LoRA: regular expression of parameters to train in full beside the adapters, and save with them.")
flags.DEFINE_boolean("freeze_embedding", True, "Full: leave the embedding (and an untied head) as it is; it is most of a small model.")
flags.DEFINE_float("replay", 0.0, "Share of examples about other matters mixed in, 0 to 1. It softens forgetting.")
flags.DEFINE_integer("batch_rows", 4, "Rows of packed tokens per optimizer step.", lower_bound=1)
flags.DEFINE_integer("seq_len", 128, "Tokens per row; longer texts are cut into pieces.", lower_bound=2)
flags.DEFINE_string("rows", None, "Folder of scripts/pack_rows.py: train on its rows instead of packing --corpus in memory.")
flags.DEFINE_integer("accumulate", 1, "Parts that a step's rows are computed in. Same result, less memory.", lower_bound=1)
flags.DEFINE_float("warmup", 0.05, "Share of the steps over which the learning rate rises; then it falls along a cosine.")
flags.DEFINE_float("weight_decay", 0.0, "AdamW's, on matrices only.", lower_bound=0)
flags.DEFINE_float("clip_norm", 1.0, "Bound of the gradient's global norm.")
flags.DEFINE_enum("dtype", "float32", list(common.DTYPES), "Type of activations. What trains is kept in --param_dtype.")
flags.DEFINE_enum("remat", "none", REMAT, common.REMAT_HELP)
flags.DEFINE_enum("attention", "xla", ATTENTION, "Who computes attention: XLA, or on NVIDIA GPUs in bfloat16 cuDNN's fused kernel.")
flags.DEFINE_enum("optimizer", "adamw", OPTIMIZERS, "AdamW; Adafactor (hardly any state); Muon (one moment, orthogonalised updates).")
flags.DEFINE_enum("param_dtype", "float32", [*common.DTYPES], "Type of what trains; bfloat16 halves its memory and rounds stochastically.")
common.define_mesh_flag()
flags.DEFINE_integer("checkpoint_every", 50, "Steps between checkpoints; 0 for none.", lower_bound=0)
flags.DEFINE_integer("seed", 0, "Seed of the generated corpus, data order and adapter start.")
flags.DEFINE_boolean("wandb", False, "Mirror the metrics to an offline wandb run in the run's folder.")
flags.DEFINE_string("name", None, "Name of the run's folder (default: the method and a hash of the configuration).")
flags.DEFINE_string("runs", "runs", "Folder that runs are written to.")

# Flags that change what is learned; the rest change how, where, or what is kept of it.
_IDENTITY = (
    *("model", "method", "epochs", "steps", "freeze_embedding", "replay", "batch_rows", "seq_len", "rows"),
    *(
        "rank",
        "alpha",
        "targets",
        "rank_pattern",
        "alpha_pattern",
        "layers",
        "rslora",
        "dora",
        "init",
        "lora_plus",
        "dropout",
        "train_also",
    ),
    *("accumulate", "warmup", "weight_decay", "clip_norm", "dtype", "optimizer", "param_dtype", "seed"),
)


def main(_: list[str]) -> None:
    with processes.processes_from_flags():
        _finetune()


def _finetune() -> None:
    values = flags.FLAGS
    # All that can be refused is refused before anything is on disk.
    spec = _spec() if values.method == "lora" else None
    if spec is None and values.base != "float":
        raise UserError(
            f"--method=full trains the kernels, which --base={values.base} stores as integers; use --method=lora or --base=float"
        )
    train_config, settings = _train_config(), _settings()
    model = dataclasses.replace(common.describe_decoder(), attention=values.attention)
    mesh = common.mesh_from_flags(model, train_config, spec, label="finetune")
    corpus = common.corpus_from_flags()
    tokenizer = hub.tokenizer(values.model)
    examples = _training_data(corpus, tokenizer, settings, model.config.eos_id)
    check(model, model.abstract_params(), examples, train_config, spec=spec, mesh=mesh)
    params = common.load_weights(layout(model, train_config, mesh, spec))
    config = {**common.config_from_flags(*_IDENTITY), "lr": train_config.learning_rate, **common.corpus_identity(corpus)}
    opened = open_run if distributed.is_main() else find_run
    name = values.name or f"finetune-{values.method}-{config_hash(config)}"
    run = distributed.together(lambda: opened(Path(values.runs), name, config))
    code = environment() | {"weights": weights_hash(params)}  # before a full training takes them over
    if distributed.of_main(run.file("result.json").exists()):
        if distributed.is_main():
            discard_checkpoints(run.path)  # of a start that ended in between
        say("finetune", f"finished earlier; delete {run.path} to train again")
    else:
        counts = f"{len(corpus.documents)} documents, {len(corpus.training_questions)} training questions"
        say("finetune", f"{corpus.name}: {counts}; writing to {run.path}")
        with tracker(run.path, values.wandb and distributed.is_main(), config) as track:

            def log(**row: Any) -> None:
                run.log(method=values.method, **row)
                track(**row)

            kept = {"run_dir": run.path, "log": log, "label": values.method}
            _save(run, code, train(model, params, examples, train_config, spec=spec, mesh=mesh, donate=True, **kept))
    distributed.wait_for_all("saved")
    _show(run, Generator(model, tokenizer, mesh=mesh), _learned(run, model, params, mesh), corpus.questions)


def _training_data(corpus: Corpus, tokenizer: Tokenizer, settings: Settings, eos_id: int) -> list[list[Example]] | PackedRows:
    if flags.FLAGS.rows is None:
        return training_examples(corpus, tokenizer, settings, eos_id)
    if settings.replay:
        raise UserError("--replay does not go with --rows, which were packed without other matters")
    rows = PackedRows.open(Path(flags.FLAGS.rows))
    if rows.about["tokenizer"] != zlib.crc32(tokenizer.to_str().encode()):
        raise UserError(f"{rows.folder} was packed with another tokenizer than that of {flags.FLAGS.model}")
    return rows


def _train_config() -> TrainConfig:
    values = flags.FLAGS
    return TrainConfig(
        epochs=values.epochs,
        steps=values.steps,
        learning_rate=LEARNING_RATE[values.method] if values.lr is None else values.lr,
        warmup_fraction=values.warmup,
        batch_rows=values.batch_rows,
        seq_len=values.seq_len,
        accumulate=values.accumulate,
        optimizer=values.optimizer,
        param_dtype=values.param_dtype,
        remat=values.remat,
        weight_decay=values.weight_decay,
        clip_norm=values.clip_norm,
        freeze_embedding=values.freeze_embedding,
        lora_plus=values.lora_plus,
        checkpoint_every=values.checkpoint_every,
        seed=values.seed,
    )


def _spec() -> lora.Spec:
    values = flags.FLAGS
    return lora.Spec(
        rank=values.rank,
        alpha=values.alpha,
        targets=values.targets,
        layers=None if values.layers is None else tuple(_number("layers", layer, int, "numbers, such as 0,1,2") for layer in values.layers),
        rank_pattern=_pattern("rank_pattern", int),
        alpha_pattern=_pattern("alpha_pattern", float),
        rslora=values.rslora,
        dora=values.dora,
        init="lora" if values.init == "default" else values.init,
        dropout=values.dropout,
        trained=values.train_also,
    )


def _pattern(flag: str, kind: type) -> dict[str, Any]:
    given = [text.rpartition(":") for text in flags.FLAGS[flag].value]
    return {regex: _number(flag, number, kind, f"REGEX:NUMBER, such as --{flag}='q_proj:8'") for regex, _, number in given}


def _number(flag: str, text: str, kind: type, wanted: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"--{flag}: '{text}' is no number; write {wanted}") from None


def _settings() -> Settings:
    return Settings(replay=flags.FLAGS.replay, document_parts=common.document_parts())


def _save(run: Run, code: dict[str, Any], result: TrainResult) -> None:
    if result.spec is None:
        hub.save_trained(run.path, result.trainable)
    else:
        adapters = distributed.to_host(result.trainable)
        if distributed.is_main():
            lora.save(run.file(ADAPTER), adapters, result.spec)
    if not distributed.is_main():
        return
    bill = {f.name: getattr(result, f.name) for f in dataclasses.fields(result) if f.name not in ("trainable", "spec", "curve")}
    png = io.BytesIO()
    loss_curves({**row, "method": flags.FLAGS.method} for row in result.curve).savefig(png, format="png")
    write_atomic(run.file("loss.png"), png.getvalue())
    write_json(run.file("result.json"), {"final_loss": result.curve[-1]["loss"], **bill, "environment": code})
    discard_checkpoints(run.path)


def _learned(run: Run, model: Decoder, params: trees.Tree, mesh: Mesh) -> trees.Tree:
    """The model's parameters with what the run has learned, from disk: what is shown is what was saved."""
    if flags.FLAGS.method == "full":
        return hub.load_trained(run.path, params)
    adapters, spec = lora.load(run.file(ADAPTER), params)
    return lora.attach(params, shard(adapters, shardings(lora.axes(adapters, model.axes()), adapters, mesh)), spec)


def _show(run: Run, generator: Generator, params: trees.Tree, questions: Sequence[Question]) -> None:
    shown = questions[:: max(len(questions) // N_SHOWN, 1)][:N_SHOWN]
    prompts = [prompt.closed_book_prefix() + prompt.closed_book(question.text) for question in shown]
    replies = generator.generate(params, prompts, Sampling(max_new_tokens=12))
    if not distributed.is_main():
        return
    result = read_json(run.file("result.json"))
    print(f"\nTrained {result['trainable_parameters']:,} parameters for {result['steps']} steps on {result['tokens']:,} tokens")
    print(f"  in {result['seconds']:.0f} s ({result['tokens_per_second']:.0f} tokens/s), compiled in {result['compile_seconds']:.0f} s;")
    print(f"  {result['peak_memory_bytes'] / 1e9:.1f} GB at the peak, final loss {result['final_loss']:.3f} nats per token.")
    for question, reply in zip(shown, replies, strict=True):
        print(f"\n  {question.text}\n    model:  {reply.text.strip()}\n    answer: {question.answers[0]}")
    print(f"\nLook at {run.path}/loss.png. If the loss still falls at the end, train longer (--epochs); if it jumps, lower --lr.")
    print(f"Next: ask it more with python -m experiments.answer --run={run.path},")
    print("or see what training buys, costs and forgets beside retrieval with python -m experiments.compare.")


if __name__ == "__main__":
    run_main(main)
