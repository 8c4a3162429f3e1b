"""Savings and costs of a quantised base: bytes, time of a LoRA step, perplexity, and what an
adapter learns beside it.

    python -m benchmarks.quantized_base --measure=steps              bytes and step times of each base, in turns
    python -m benchmarks.quantized_base --measure=perplexity         of held-out prose, before any training
    python -m benchmarks.quantized_base --measure=learning --bases=nf4 --seeds=0      train an adapter, ask what it has learned
    python -m benchmarks.quantized_base --show                       the tables of what was measured so far

Bases: float32; bfloat16 (kernels rounded to it, for the perplexity and for what is learned); int8;
nf4. All compute in float32, so a difference is that of what is stored. Ratios of step times are
those of medians, with a 95% bootstrap over rounds; perplexities are over float32's on the same
texts, bootstrapped over texts; answers are compared question by question. Each seed of `learning`
makes people of its own, an adapter's start and an order of the data, the same for every base.
Measurements are added to OUT/quantized_base.json, in place of earlier ones of the same base and
seed; OUT/quantized_base.md shows all of them.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.turns import ratio
from kafjax import corpus, hub, lora
from kafjax.core import trees
from kafjax.core.config import changed
from kafjax.core.errors import UserError, nearest, run_main
from kafjax.core.progress import Progress, say, waiting
from kafjax.core.rundir import environment, read_json, write_atomic, write_json
from kafjax.evaluation import table
from kafjax.evaluation.intervals import mean_score, paired_difference, perplexity, perplexity_ratio
from kafjax.methods import Lab, Settings, open_method
from kafjax.models import Decoder
from kafjax.ops.quantized import FORMATS, quantize_params
from kafjax.parallel import make_mesh, shard
from kafjax.training import Example, TrainConfig
from kafjax.training.batches import make_batch, pack
from kafjax.training.step import batch_sharding
from kafjax.training.task import Task

BASES = ("float32", "bfloat16", *FORMATS)
SPLITS = ("seen", "paraphrase")


def define_flags() -> None:
    """Defines the flags. Not done at import: tests import several benchmarks, whose flags share
    names."""
    flags.DEFINE_string("model", "gemma3-270m", "Language model: gemma3-270m, or a folder.")
    flags.DEFINE_enum("measure", "steps", ["steps", "perplexity", "learning"], "What to measure.")
    flags.DEFINE_list("bases", list(BASES), "Bases to measure.")
    flags.DEFINE_list("seeds", ["0"], "learning: seeds.")
    flags.DEFINE_integer("texts", 24, "perplexity: pieces of prose of the Factbook.", lower_bound=2)
    flags.DEFINE_integer(
        "subjects", 8, "learning: people, half of whom are asked about in training.", lower_bound=2
    )
    flags.DEFINE_integer(
        "epochs", 8, "learning: passes over their biographies and questions.", lower_bound=1
    )
    flags.DEFINE_integer("rank", 16, "Rank of the adapter; alpha is twice that.", lower_bound=1)
    flags.DEFINE_integer("rows", 4, "steps: rows.", lower_bound=1)
    flags.DEFINE_integer("seq_len", 128, "steps: tokens per row.", lower_bound=2)
    flags.DEFINE_integer(
        "rounds", 7, "steps: turns measured, after one that is not.", lower_bound=1
    )
    flags.DEFINE_boolean("show", False, "Measure nothing; write the tables anew.")
    flags.DEFINE_string("out", "benchmarks/results", "Folder that the results are written to.")


def main(_: list[str]) -> None:
    values = flags.FLAGS
    for base in values.bases:
        if base not in BASES:
            raise UserError(f"unknown base '{base}'. {nearest(base, BASES)}")
    file = Path(values.out) / "quantized_base.json"
    results = read_json(file) if file.exists() else {"steps": {}, "perplexity": {}, "learning": {}}
    if not values.show:
        with waiting("model", f"loading {values.model}"):
            model, params = hub.load_decoder(values.model)
        measure = {
            "steps": measure_steps,
            "perplexity": measure_perplexity,
            "learning": measure_learning,
        }[values.measure]
        results[values.measure].update(measure(model, params))
        results["environment"] = environment()
        write_json(file, results)
    text = table.render([make(results[name]) for name, make in TABLES.items() if results[name]])
    write_atomic(Path(values.out) / "quantized_base.md", text)
    print(f"\n{text}")


def stored(params: trees.Tree, base: str) -> trees.Tree:
    if base in FORMATS:
        return quantize_params(params, base)

    def is_rounded(path: str) -> bool:
        return base == "bfloat16" and path.endswith("/kernel")

    return trees.map_with_path(
        lambda path, x: x.astype(jnp.bfloat16).astype(x.dtype) if is_rounded(path) else x, params
    )


def n_bytes(params: trees.Tree, base: str) -> dict[str, int]:
    """Bytes of the kernels and of all parameters, as they are stored."""
    kernels = trees.n_bytes(
        {path: leaf for path, leaf in trees.flatten(params).items() if path.endswith("/kernel")}
    )
    rest = trees.n_bytes(params) - kernels
    kernels = kernels // 2 if base == "bfloat16" else kernels
    return {"kernels": kernels, "all": kernels + rest}


def measure_steps(model: Decoder, params: trees.Tree) -> dict[str, Any]:
    """LoRA steps on the same tokens beside each base, in turns. bfloat16 has its bytes only: a CPU
    computes in it by detours."""
    values = flags.FLAGS
    tokens_BxT1 = (
        np.random.default_rng(0)
        .integers(3, model.config.vocab_size, (values.rows, values.seq_len + 1))
        .astype(np.int32)
    )
    examples = [Example(tokens, np.ones(len(tokens), np.float32)) for tokens in tokens_BxT1]
    batch = make_batch(
        pack(examples, values.seq_len), seq_len=values.seq_len, batch_rows=values.rows
    )
    config = TrainConfig(
        steps=values.rounds + 1, batch_rows=values.rows, seq_len=values.seq_len, loss_chunk=512
    )
    cases: dict[str, Any] = {}
    steps: dict[str, Callable[[], float]] = {}
    for base in values.bases:
        held = stored(params, base)
        cases[base] = {"bytes": n_bytes(held, base)}
        if base != "bfloat16":
            with waiting(base, "compiling"):
                steps[base], program = _step(model, held, config, batch)
            cases[base] |= {
                "argument_bytes": program.argument_bytes,
                "temporary_bytes": program.temporary_bytes,
            }
    seconds: dict[str, list[float]] = {base: [] for base in steps}
    with Progress("steps", values.rounds + 1, unit="round") as bar:
        for round_ in range(values.rounds + 1):
            for base in np.roll(list(steps), round_):
                began = time.perf_counter()
                loss = steps[base]()
                seconds[base].append(time.perf_counter() - began)
                cases[base].setdefault("first_loss", loss)
            bar.advance(1)
    for base, taken in seconds.items():
        cases[base] |= {
            "seconds": taken[1:],
            "rows": values.rows,
            "seq_len": values.seq_len,
            "rank": values.rank,
        }
        if "float32" in seconds:
            cases[base]["time"] = ratio(np.array(seconds["float32"][1:]), np.array(taken[1:]))
    return cases


def _step(
    model: Decoder, params: trees.Tree, config: TrainConfig, batch: Any
) -> tuple[Callable[[], float], Any]:
    task = Task.lora(
        model,
        params,
        config,
        make_mesh(),
        config.steps,
        lora.Spec(flags.FLAGS.rank, 2.0 * flags.FLAGS.rank),
    )
    program, state = task.compile(batch), task.new_state()
    batch = shard(batch, batch_sharding(make_mesh()))

    def step() -> float:
        nonlocal state
        state, metrics = jax.block_until_ready(program.step(state, task.frozen, batch))
        return float(metrics["loss"])

    return step, program


def measure_perplexity(model: Decoder, params: trees.Tree) -> dict[str, Any]:
    """Sums of negative log-likelihood, text by text."""
    cases = {}
    with tempfile.TemporaryDirectory() as folder:
        lab = _lab(model, params, Settings(), Path(folder), seed=0)
        for base in flags.FLAGS.bases:
            with waiting("perplexity", base):
                nll, tokens = lab.held_out_nll(stored(params, base))
            cases[base] = {"nll": nll, "tokens": tokens}
    return cases


def measure_learning(model: Decoder, params: trees.Tree) -> dict[str, Any]:
    """Exact match, question by question, of an adapter trained beside each base and merged; and its
    losses."""
    values, cases = flags.FLAGS, {}
    for seed, base in ((seed, base) for seed in map(int, values.seeds) for base in values.bases):
        curve: list[float] = []
        sizes = {
            "epochs": values.epochs,
            "rank": values.rank,
            "alpha": 2.0 * values.rank,
            "checkpoint_every": 0,
            "seed": seed,
        }
        settings = dataclasses.replace(changed(Settings(), **sizes), document_parts=4)
        with tempfile.TemporaryDirectory() as folder:
            lab = _lab(model, stored(params, base), settings, Path(folder), seed)
            lab = dataclasses.replace(lab, log=lambda curve=curve, **row: curve.append(row["loss"]))
            method = open_method(lab, "lora")
            method.learn()
            asked = [question for question in lab.corpus.questions if question.split in SPLITS]
            answers = method.answer(asked)
        by_split = {
            split: [a.score["exact_match"] for a in answers if a.split == split] for split in SPLITS
        }
        cases[f"{base} {seed}"] = {"base": base, "seed": seed, "losses": curve, **by_split}
        say(f"{base}, seed {seed}", f"last loss {curve[-1]:.4f}")
    return cases


def _lab(model: Decoder, params: trees.Tree, settings: Settings, folder: Path, seed: int) -> Lab:
    values = flags.FLAGS
    known = corpus.load(
        "biographies", n_subjects=values.subjects, seed=seed, n_retention=8, n_held_out=values.texts
    )
    return Lab(
        model,
        params,
        make_mesh(),
        hub.tokenizer(values.model),
        known,
        settings,
        folder,
        lambda **row: None,
        Progress,
    )


def _ordered(cases: Mapping[str, Any]) -> list[str]:
    return [base for base in BASES if base in cases]


def steps_table(cases: Mapping[str, Any]) -> table.Table:
    whole = cases["float32"]["bytes"] if "float32" in cases else None

    def row(base: str) -> tuple[str, ...]:
        case = cases[base]

        def size(part: str) -> str:
            return f"{case['bytes'][part] / 1e6:,.0f}" + (
                f" ({case['bytes'][part] / whole[part]:.3f}x)" if whole else ""
            )

        if "seconds" not in case:
            return base, size("kernels"), size("all"), "-", "-", "-"
        memory = f"{case['argument_bytes'] / 1e6:,.0f} + {case['temporary_bytes'] / 1e6:,.0f}"
        return (
            base,
            size("kernels"),
            size("all"),
            memory,
            f"{np.median(case['seconds']):.2f}",
            table.ratio(case.get("time")),
        )

    headers = (
        "base",
        "kernels, MB",
        "all, MB",
        "arguments + temporaries, MB",
        "s a step",
        "time / float32",
    )
    notes = (
        "All: with embeddings and norms in float32. Arguments and temporaries of the compiled step as XLA plans them.",
    )
    return table.Table(
        "A LoRA step beside each base", headers, tuple(map(row, _ordered(cases))), notes
    )


def perplexity_table(cases: Mapping[str, Any]) -> table.Table:
    def row(base: str) -> tuple[str, ...]:
        case, floats = cases[base], cases.get("float32")
        own = dataclasses.asdict(perplexity(case["nll"], case["tokens"]))
        over = (
            dataclasses.asdict(perplexity_ratio(case["nll"], floats["nll"], case["tokens"]))
            if floats
            else None
        )

        def show(i: Mapping[str, float] | None, digits: int) -> str:
            return (
                f"{i['value']:.{digits}f} [{i['low']:.{digits}f}, {i['high']:.{digits}f}]"
                if i
                else "-"
            )

        return (
            base,
            show(own, 2),
            show(over, 4),
            f"{len(case['tokens'])}",
            f"{sum(case['tokens']):,}",
        )

    headers = ("base", "perplexity", "over float32's", "texts", "tokens")
    notes = (
        "Of prose of the World Factbook, untrained. 95% bootstrap over texts, the ratio paired by text.",
    )
    return table.Table(
        "Perplexity before training", headers, tuple(map(row, _ordered(cases))), notes
    )


def learning_table(cases: Mapping[str, Any]) -> table.Table:
    bases = [base for base in BASES if any(case["base"] == base for case in cases.values())]

    def scores(base: str, split: str, seeds: list[int]) -> list[float]:
        return [score for seed in seeds for score in cases[f"{base} {seed}"][split]]

    def row(base: str) -> tuple[str, ...]:
        seeds = sorted(case["seed"] for case in cases.values() if case["base"] == base)
        losses = [cases[f"{base} {seed}"]["losses"] for seed in seeds]
        cells = [", ".join(f"{np.mean(of_seed[-5:]):.3f}" for of_seed in losses)]
        for split in SPLITS:
            cells.append(table.percent(dataclasses.asdict(mean_score(scores(base, split, seeds)))))
        both = [seed for seed in seeds if f"float32 {seed}" in cases]
        pairs = (
            [
                [score for split in SPLITS for score in scores(which, split, both)]
                for which in (base, "float32")
            ]
            if both
            else None
        )
        change = (
            "-"
            if base == "float32" or not pairs
            else table.percent(dataclasses.asdict(paired_difference(*pairs)), signed=True)
        )
        n = len(scores(base, SPLITS[0], seeds))
        return base, ", ".join(map(str, seeds)), f"{len(losses[0])}", *cells, f"{n} + {n}", change

    headers = (
        "base",
        "seeds",
        "steps",
        "last loss",
        *(f"{split} %" for split in SPLITS),
        "questions",
        "change, points",
    )
    notes = (
        "Last loss: mean of the last five steps, a seed each. Exact match with 95% intervals over questions of all seeds.",
        "Change: paired with float32's answers to the same questions of both kinds.",
    )
    return table.Table(
        "What an adapter learns beside each base", headers, tuple(map(row, bases)), notes
    )


TABLES = {"steps": steps_table, "perplexity": perplexity_table, "learning": learning_table}

if __name__ == "__main__":
    define_flags()
    run_main(main)
