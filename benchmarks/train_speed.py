"""Training speed beside torch: tokens/s of the full and the LoRA step, kafjax and torch +
transformers + peft in turns.

    python -m benchmarks.train_speed                                 four cases, Gemma 3 270M, float32
    python -m benchmarks.train_speed --dtype=bfloat16 --steps=20     other numbers, longer
    python -m benchmarks.train_speed --cases=lora_last16 --rank=64   one case
    python -m benchmarks.train_speed --model=random:llama3.2-1b --dtype=bfloat16 --attention=cudnn --rows=8 --seq_len=2048    on a GPU
    python -m benchmarks.train_speed --model=random:llama3.1-8b --dtype=bfloat16 --param_dtype=bfloat16 --remat=full --sides=ours ...

Where JAX finds a GPU, torch uses it too, and the table has the share of the GPU's peak that the
model's arithmetic makes (MFU).

Both sides get the same weights, tokens and threads and do the same work: forward, backward,
clipping by global norm, AdamW, embedding frozen (and with it the tied head), logits only where the
loss looks. That last point favours torch: its own training would compute logits everywhere, so here
the hidden states are picked before the head. torch runs eagerly with its fused AdamW and its own
choice of attention. In bfloat16 what trains is float32 on both sides (torch: autocast), or
--param_dtype, and what is frozen is bfloat16.

First both losses and both gradient norms are compared (adapters begin the same): a difference above
1e-3 (float32) ends the benchmark. Then the sides take turns, the first turn alternating, with a
rest between so that no thread pool still spins in the other's time. The ratio is that of the median
step times; its interval is a 95% bootstrap over rounds. Writes OUT/train_speed.json and .md.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
import transformers
from absl import flags

from benchmarks import ours, theirs
from benchmarks.peers import hf_model
from benchmarks.turns import in_turns, listed, ratio, sample_tokens
from benchmarks.work import TrainWork
from kafjax import hub
from kafjax.core import trees
from kafjax.core.errors import UserError, nearest, run_main
from kafjax.core.progress import say, waiting
from kafjax.core.rundir import environment, write_atomic, write_json
from kafjax.evaluation import table
from kafjax.models import Decoder, named
from kafjax.ops.attention import ATTENTION
from kafjax.parallel.chips import chip_of

CASES = {
    "lora_all": ("LoRA, loss on all tokens", True, None),
    "lora_last16": ("LoRA, loss on the last 16", True, 16),
    "full_all": ("full, loss on all tokens", False, None),
    "full_last16": ("full, loss on the last 16", False, 16),
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
SIDES = ("ours", "theirs")
ON_GPU = jax.default_backend() == "gpu"


_SETTINGS = (
    "model",
    "sides",
    "rows",
    "seq_len",
    "rank",
    "dtype",
    "param_dtype",
    "remat",
    "attention",
    "steps",
    "warmup",
)


@dataclasses.dataclass(frozen=True)
class Measured:
    """One side of a case: seconds of each measured step, `[rounds]`; losses and gradient norms of
    all steps, warm-up included."""

    seconds: np.ndarray
    losses: np.ndarray
    norms: np.ndarray


def define_flags() -> None:
    """Defines the flags. Not done at import: tests import several benchmarks, whose flags share
    names."""
    flags.DEFINE_string(
        "model",
        "gemma3-270m",
        "gemma3-270m, a folder, or random:NAME: random weights in a published shape (llama3.2-1b).",
    )
    flags.DEFINE_list("cases", list(CASES), f"What is measured: {', '.join(CASES)}.")
    flags.DEFINE_list(
        "sides",
        list(SIDES),
        "ours, theirs, or both in turns. One alone has all the memory, and no ratio.",
    )
    flags.DEFINE_integer("steps", 10, "Steps measured of each side and case.", lower_bound=1)
    flags.DEFINE_integer("warmup", 2, "Steps before those.", lower_bound=1)
    flags.DEFINE_integer("rows", 4, "Rows per step.", lower_bound=1)
    flags.DEFINE_integer("seq_len", 128, "Tokens per row.", lower_bound=17)
    flags.DEFINE_integer(
        "rank", 8, "LoRA: rank of the adapter; alpha is twice that.", lower_bound=1
    )
    flags.DEFINE_enum(
        "dtype", "float32", list(DTYPES), "Type of activations and of frozen weights."
    )
    flags.DEFINE_enum("param_dtype", "float32", list(DTYPES), "Full: type of what trains.")
    flags.DEFINE_enum(
        "remat",
        "none",
        ["none", "full"],
        "full: both sides compute each layer again in the backward pass.",
    )
    flags.DEFINE_enum("attention", "auto", ATTENTION, "Ours; torch chooses for itself.")
    flags.DEFINE_string("out", "benchmarks/results", "Folder that the results are written to.")


def main(_: list[str]) -> None:
    values = flags.FLAGS
    for case in values.cases:
        if case not in CASES:
            raise UserError(f"unknown case '{case}'. {nearest(case, CASES)}")
    torch.set_num_threads(os.cpu_count() or 1)
    for side in values.sides:
        if side not in SIDES:
            raise UserError(f"unknown side '{side}'. {nearest(side, SIDES)}")
    with waiting("model", f"loading {values.model}"):
        model, params, tokens_BxT1 = load_model()
    rows = {}
    for case in values.cases:
        measured = measure(case, model, params, tokens_BxT1)
        flops = ours.train_flops(model, work_of(case))
        rows[case] = row = summary(measured, values.rows * values.seq_len, flops)
        for side in measured:
            say(case, f"{side}: {row[side]['median']:.0f} tokens/s{mfu_text(row[side])}")
    settings = {name: values[name].value for name in _SETTINGS}
    settings |= {"threads": torch.get_num_threads(), "device": jax.devices()[0].device_kind}
    versions = {package.__name__: package.__version__ for package in (torch, transformers, peft)}
    text = table.render(
        [speed_table(rows)], [listed(settings), listed({**versions, "jax": jax.__version__})]
    )
    result = {"settings": settings, "cases": rows, "environment": environment(), "peers": versions}
    write_json(Path(values.out) / "train_speed.json", result)
    write_atomic(Path(values.out) / "train_speed.md", text)
    print(f"\n{text}")


def load_model() -> tuple[Decoder, trees.Tree, np.ndarray]:
    """The model, its parameters and int32 tokens `[rows, seq_len + 1]`: ordinary text, or random
    ones for random weights."""
    values = flags.FLAGS
    dtype = DTYPES[values.dtype]
    if values.model.startswith("random:"):
        model = Decoder(
            named(values.model.removeprefix("random:")),
            dtype,
            remat=values.remat,
            attention=values.attention,
        )
        kept = jnp.bfloat16 if jnp.bfloat16 in (dtype, DTYPES[values.param_dtype]) else jnp.float32
        params = jax.jit(lambda key: jax.tree.map(lambda x: x.astype(kept), model.init(key)))(
            jax.random.key(0)
        )
        shape = (values.rows, values.seq_len + 1)
        return (
            model,
            params,
            np.random.default_rng(0).integers(0, model.config.vocab_size, shape, np.int32),
        )
    model, params = hub.load_decoder(values.model, dtype=dtype)
    model = dataclasses.replace(model, remat=values.remat, attention=values.attention)
    return (
        model,
        params,
        sample_tokens(hub.tokenizer(values.model), (values.rows, values.seq_len + 1)),
    )


def work_of(case: str) -> TrainWork:
    values, (_, adapter, n_last) = flags.FLAGS, CASES[case]
    return TrainWork(
        values.rows,
        values.seq_len,
        n_last,
        values.rank if adapter else None,
        values.dtype,
        values.param_dtype,
        values.remat,
        values.warmup + values.steps,
    )


def mfu_text(side: Mapping[str, float]) -> str:
    return f", {side['mfu']:.0%} of the peak" if "mfu" in side else ""


def measure(
    case: str, model: Decoder, params: trees.Tree, tokens_BxT1: np.ndarray
) -> dict[str, Measured]:
    """Runs the sides of a case, `ours` and `theirs`, in turns.

    Raises `UserError` if their losses or gradients differ: they would not be doing the same work.
    """
    values, work = flags.FLAGS, work_of(case)
    with waiting(case, "compiling and preparing both sides"), tempfile.TemporaryDirectory() as made:
        adapter = f"{made}/adapter"  # both begin with the same
        sides = {}
        if "ours" in values.sides:
            sides["ours"] = ours.train_step(model, params, tokens_BxT1, work, adapter)
        if "theirs" in values.sides:
            kept = work.dtype if work.rank else work.param_dtype
            peer = hf_model(model, params, theirs.DTYPES[kept]).to("cuda" if ON_GPU else "cpu")
            start = adapter if "ours" in sides and work.rank else None
            sides["theirs"], _ = theirs.train_step(peer, tokens_BxT1, work, start)
    seconds, results = in_turns(
        case,
        sides,
        values.steps,
        values.warmup,
        lambda first: check_same_work(case, **first) if len(first) == 2 else None,
    )
    sides.clear()
    gc.collect()
    return {name: Measured(seconds[name], *np.array(results[name]).T) for name in seconds}


def check_same_work(case: str, ours: tuple[float, float], theirs: tuple[float, float]) -> None:
    say(
        case,
        f"first loss: kafjax {ours[0]:.6f}, torch {theirs[0]:.6f}; gradient norm: kafjax {ours[1]:.5f}, torch {theirs[1]:.5f}",
    )
    tolerance = TOLERANCE[flags.FLAGS.dtype]
    if not (abs(ours[0] - theirs[0]) <= tolerance and abs(ours[1] / theirs[1] - 1) <= tolerance):
        raise UserError(
            f"{case}: losses or gradients differ by more than {tolerance:g}; the two sides do not do the same work"
        )


def summary(measured: Mapping[str, Measured], tokens: int, flops: float) -> dict[str, Any]:
    """Tokens/s of each side (median, slowest, fastest step), its MFU on a known chip, and of two
    sides the ratio with its interval."""
    chip = chip_of(jax.devices()[0])

    def side(measured: Measured) -> dict[str, float]:
        seconds = measured.seconds
        rates = {
            "median": tokens / np.median(seconds),
            "min": tokens / seconds.max(),
            "max": tokens / seconds.min(),
        }
        rates |= {"mfu": flops / np.median(seconds) / chip.flops} if chip else {}
        losses = {
            "first_loss": measured.losses[0],
            "last_loss": measured.losses[-1],
            "first_gradient_norm": measured.norms[0],
        }
        return {name: float(value) for name, value in {**rates, **losses}.items()}

    row = {name: side(taken) for name, taken in measured.items()}
    if len(measured) < 2:
        return row
    return row | {"ratio": ratio(measured["ours"].seconds, measured["theirs"].seconds)}


def speed_table(rows: Mapping[str, Mapping[str, Any]]) -> table.Table:
    def speed(side: Mapping[str, float] | None) -> str:
        return (
            "-"
            if side is None
            else f"{side['median']:.0f} [{side['min']:.0f}, {side['max']:.0f}]{mfu_text(side)}"
        )

    def cells(case: str, row: Mapping[str, Any]) -> tuple[str, ...]:
        return (
            CASES[case][0],
            *(speed(row.get(side)) for side in SIDES),
            table.ratio(row.get("ratio")),
        )

    return table.Table(
        "Training speed, tokens/s",
        ("step", "kafjax", "torch", "kafjax / torch"),
        tuple(cells(case, row) for case, row in rows.items()),
        (
            "Median step [slowest, fastest]; ratio of the medians [95% bootstrap over rounds]. The sides took turns in one process.",
            "Same weights, tokens, losses, threads and work: embedding frozen, logits only where the loss looks, on both sides.",
        ),
    )


if __name__ == "__main__":
    define_flags()
    run_main(main)
