"""Cost of each variant of LoRA relative to the plain one: time of a step, parameters, memory,
seconds before the first step.

    python -m benchmarks.lora_variants                                  Gemma 3 270M, two rows of 64 tokens
    python -m benchmarks.lora_variants --variants=dora,pissa            those alone, and the plain one, which is always measured
    python -m benchmarks.lora_variants --show                           the table of what was measured so far

Every variant is kafjax's own training step (`training.task`): forward, backward, clipping, AdamW;
the loss looks at every token. In each round all of them take one step, in turns, every other round
backwards. The ratio is that of the median steps; its interval is a 95% bootstrap over the rounds.
Starting up means drawing the adapter and, for PiSSA and OLoRA, taking it out of the base, its
programs compiled anew; compiling the step is not in it.

Measurements are added to OUT/lora_variants.json, in place of an earlier one of the same variant.
OUT/lora_variants.md shows all of them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from benchmarks.turns import ratio
from kafjax import hub, lora
from kafjax.core import trees
from kafjax.core.errors import UserError, nearest, run_main
from kafjax.core.progress import Progress, say, waiting
from kafjax.core.rundir import environment, read_json, write_atomic, write_json
from kafjax.evaluation import table
from kafjax.models import Decoder
from kafjax.parallel import make_mesh, shard
from kafjax.training import Example, TrainConfig
from kafjax.training.batches import Batch, make_batch, pack
from kafjax.training.step import batch_sharding
from kafjax.training.task import Task

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("LoRA", {}),
    "rslora": ("rsLoRA", {"rslora": True}),
    "lora_plus": ("LoRA+", {"lora_plus": 8.0}),
    "dora": ("DoRA", {"dora": True}),
    "pissa": ("PiSSA", {"init": "pissa"}),
    "olora": ("OLoRA", {"init": "olora"}),
    "dropout": ("dropout 0.1", {"dropout": 0.1}),
    "trained": ("norms in full", {"trained": "norm/scale"}),
    "token_rows": ("16 token rows", {"token_rows": tuple(range(16))}),
    "embedding": ("embedding too", {"targets": rf"embed/|{lora.Spec().targets}"}),
}
"""Variants by name, with what each sets: a field of `Spec`, or `lora_plus` of `TrainConfig`."""


def define_flags() -> None:
    """Defines the flags. Not done at import: tests import several benchmarks, whose flags share
    names."""
    flags.DEFINE_string("model", "gemma3-270m", "gemma3-270m, or a folder of a decoder.")
    flags.DEFINE_list("variants", list(VARIANTS), "Which to measure.")
    flags.DEFINE_integer("rows", 2, "Rows per step.", lower_bound=1)
    flags.DEFINE_integer("seq_len", 64, "Tokens per row.", lower_bound=2)
    flags.DEFINE_integer("rank", 16, "Rank of the adapters; alpha is twice that.", lower_bound=1)
    flags.DEFINE_integer("rounds", 7, "Rounds measured.", lower_bound=1)
    flags.DEFINE_integer("warmup", 1, "Rounds before those.", lower_bound=1)
    flags.DEFINE_boolean("show", False, "Measure nothing; write the table anew.")
    flags.DEFINE_string("out", "benchmarks/results", "Folder that the results are written to.")


@dataclasses.dataclass(frozen=True)
class Ready:
    """A variant before its first step. `step()` is done when it returns."""

    step: Callable[[], float]
    trainable_parameters: int
    temporary_bytes: int
    start_seconds: float


def main(_: list[str]) -> None:
    values = flags.FLAGS
    file = Path(values.out) / "lora_variants.json"
    results = read_json(file) if file.exists() else {"cases": {}}
    if not values.show:
        if unknown := [name for name in values.variants if name not in VARIANTS]:
            raise UserError(f"--variants: unknown '{unknown[0]}'. {nearest(unknown[0], VARIANTS)}")
        with waiting("model", f"loading {values.model}"):
            model, params = hub.load_decoder(values.model)
        results["cases"] |= measure(model, params, list(dict.fromkeys(["plain", *values.variants])))
        results["environment"] = environment()
        write_json(file, results)
    if not results["cases"]:
        raise UserError(f"{file} holds no measurement yet; run without --show")
    text = table.render([variants_table(results["cases"])], [])
    write_atomic(Path(values.out) / "lora_variants.md", text)
    print(f"\n{text}")


def measure(model: Decoder, params: trees.Tree, names: list[str]) -> dict[str, dict[str, Any]]:
    """All of `names` in turns, `{name: figures}`."""
    values = flags.FLAGS
    n_rounds = values.warmup + values.rounds
    ready = {}
    for name in names:
        with waiting(VARIANTS[name][0], "drawing and compiling"):
            ready[name] = prepare(model, params, VARIANTS[name][1], n_rounds)
        say(VARIANTS[name][0], f"started in {ready[name].start_seconds:.1f} s")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with Progress("variants", n_rounds, unit="round") as bar:
        for n in range(n_rounds):
            for name in names[:: 1 if n % 2 else -1]:
                began = time.perf_counter()
                ready[name].step()
                seconds[name].append(time.perf_counter() - began)
            bar.advance(1, f"plain {seconds['plain'][-1]:.2f} s")
    measured = {name: np.array(taken[values.warmup :]) for name, taken in seconds.items()}
    of_all = {
        "model": values.model,
        "rows": values.rows,
        "seq_len": values.seq_len,
        "rank": values.rank,
    }
    return {
        name: {
            **of_all,
            "ratio": ratio(measured["plain"], measured[name]),
            "seconds": measured[name].tolist(),
            "plain_seconds": measured["plain"].tolist(),
            **{
                field: getattr(case, field)
                for field in ("trainable_parameters", "temporary_bytes", "start_seconds")
            },
        }
        for name, case in ready.items()
    }


def prepare(model: Decoder, params: trees.Tree, changes: Mapping[str, Any], n_steps: int) -> Ready:
    values = flags.FLAGS
    config = TrainConfig(
        steps=n_steps,
        batch_rows=values.rows,
        seq_len=values.seq_len,
        loss_chunk=512,
        lora_plus=changes.get("lora_plus", 1.0),
    )
    of_spec = {name: value for name, value in changes.items() if name != "lora_plus"}
    spec = lora.Spec(**{"rank": values.rank, "alpha": 2.0 * values.rank, **of_spec})
    jax.clear_caches()  # else a variant that starts as another one did would find its programs
    began = time.perf_counter()
    task = Task.lora(model, params, config, make_mesh(), n_steps, spec)
    state = jax.block_until_ready(task.new_state())
    start_seconds = time.perf_counter() - began
    batch = _batch(model.config.vocab_size)
    program = task.lower(batch).compile()
    batch = shard(batch, batch_sharding(make_mesh()))

    def step() -> float:
        nonlocal state
        state, metrics = jax.block_until_ready(program(state, task.frozen, batch))
        return float(metrics["loss"])

    return Ready(
        step, lora.count(spec, params), program.memory_analysis().temp_size_in_bytes, start_seconds
    )


def _batch(vocab_size: int) -> Batch:
    values = flags.FLAGS
    tokens_BxT1 = (
        np.random.default_rng(0)
        .integers(3, vocab_size, (values.rows, values.seq_len + 1))
        .astype(np.int32)
    )
    examples = [Example(tokens, np.ones(len(tokens), np.float32)) for tokens in tokens_BxT1]
    return make_batch(
        pack(examples, values.seq_len), seq_len=values.seq_len, batch_rows=values.rows
    )


def variants_table(cases: Mapping[str, Mapping[str, Any]]) -> table.Table:
    def row(name: str, case: Mapping[str, Any]) -> tuple[str, ...]:
        return (
            VARIANTS[name][0],
            table.ratio(case["ratio"]),
            f"{case['trainable_parameters']:,}",
            f"{case['temporary_bytes'] / 1e6:,.0f}",
            f"{case['start_seconds']:.1f}",
        )

    shown = [name for name in VARIANTS if name in cases]
    case = cases[shown[0]]
    title = f"Variants of LoRA: {case['model']}, rank {case['rank']}, {case['rows']}x{case['seq_len']} tokens a step"
    notes = (
        f"Step: of the median of the plain one, {np.median(case['plain_seconds']):.2f} s, in the same rounds "
        f"[95% bootstrap over {case['ratio']['n']} rounds].",
        "MB: the temporaries of the step, as XLA plans them. Start: seconds until the adapter is drawn, compiling that included.",
    )
    headers = ("variant", "step / plain", "trainable parameters", "temporaries, MB", "start, s")
    return table.Table(title, headers, tuple(row(name, cases[name]) for name in shown), notes)


if __name__ == "__main__":
    define_flags()
    run_main(main)
