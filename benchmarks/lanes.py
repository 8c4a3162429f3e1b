"""N adapters trained as lanes of one program beside the same N trained one after another: tokens/s,
memory, compile time.

    python -m benchmarks.lanes                                             a small random model, 1 to 32 lanes
    python -m benchmarks.lanes --model=gemma3-270m --rows=2 --seq_len=64 --lanes=1,2,4,8 --rounds=3
    python -m benchmarks.lanes --show                                      table and figure of what was measured so far

Both sides run kafjax's own steps (`training.lane_step`, `training.task`) with the same rank, rows
and tokens: forward, backward, clipping, AdamW; the loss looks at every token. One after another
means N single steps, so a single step is timed and multiplied by N. The two take turns, the first
turn alternating. The ratio is that of the medians; its interval is a 95% bootstrap over rounds.
Compile time is not in it: it is a column of its own (one after another, each run compiles for
itself, since its learning rate is part of its program).

Measurements are added to OUT/lanes.json, in place of an earlier one of the same model, rows, tokens
and lanes. OUT/lanes.md and .png show all of them.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from absl import flags

from benchmarks.turns import ratio
from kafjax import hub, lora
from kafjax.core import trees
from kafjax.core.errors import UserError, run_main
from kafjax.core.progress import Progress, say, waiting
from kafjax.core.rundir import environment, read_json, write_atomic, write_json
from kafjax.evaluation import table
from kafjax.evaluation.figures import METHOD_STYLE, STYLE, new_figure, save_figure
from kafjax.models import Decoder, DecoderConfig
from kafjax.parallel import make_mesh, shard
from kafjax.training import Example, TrainConfig
from kafjax.training.batches import Batch, make_batch, pack
from kafjax.training.lane_step import LaneInputs, LaneTask
from kafjax.training.step import batch_sharding
from kafjax.training.task import Task

SCRATCH = DecoderConfig(
    vocab_size=8192,
    hidden_size=256,
    mlp_size=1024,
    n_layers=6,
    n_heads=4,
    n_kv_heads=1,
    head_dim=64,
    sliding=(True, True, False) * 2,
    window=64,
)


def define_flags() -> None:
    """Defines the flags. Not done at import: tests import several benchmarks, whose flags share
    names."""
    flags.DEFINE_string(
        "model",
        "scratch",
        "scratch (9 million random parameters), gemma3-270m, or a folder of one of the families in docs/models.md.",
    )
    flags.DEFINE_list("lanes", ["1", "2", "4", "8", "16", "32"], "Numbers of lanes to measure.")
    flags.DEFINE_integer("rows", 2, "Rows per step of each lane.", lower_bound=1)
    flags.DEFINE_integer("seq_len", 64, "Tokens per row.", lower_bound=2)
    flags.DEFINE_integer("rank", 8, "Rank of the adapters; alpha is twice that.", lower_bound=1)
    flags.DEFINE_integer("rounds", 5, "Turns measured of each side.", lower_bound=1)
    flags.DEFINE_integer("warmup", 1, "Turns before those.", lower_bound=1)
    flags.DEFINE_boolean("show", False, "Measure nothing; write table and figure anew.")
    flags.DEFINE_string("out", "benchmarks/results", "Folder that the results are written to.")


def main(_: list[str]) -> None:
    values = flags.FLAGS
    file = Path(values.out) / "lanes.json"
    results = read_json(file) if file.exists() else {"cases": {}}
    if not values.show:
        numbers = [_whole(text) for text in values.lanes]
        model, params = _model()
        for n in numbers:
            case = measure(model, params, n)
            results["cases"][f"{values.model} {values.rows}x{values.seq_len} {n}"] = case
            results["environment"] = environment()
            write_json(file, results)
            say(
                f"{n} lanes",
                f"{table.ratio(case['ratio'])} times the throughput of one after another",
            )
    if not results["cases"]:
        raise UserError(f"{file} holds no measurement yet; run without --show")
    cases = sorted(
        results["cases"].values(),
        key=lambda case: (case["model"], case["rows"] * case["seq_len"], case["lanes"]),
    )
    text = table.render([lanes_table(cases)], [])
    write_atomic(Path(values.out) / "lanes.md", text)
    draw(cases, Path(values.out) / "lanes.png")
    print(f"\n{text}")


def _whole(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise UserError(f"--lanes: '{text}' is not a number of lanes; write --lanes=1,2,4")
    return int(text)


def _model() -> tuple[Decoder, trees.Tree]:
    if flags.FLAGS.model == "scratch":
        model = Decoder(SCRATCH)
        return model, jax.jit(model.init)(jax.random.key(0))
    with waiting("model", f"loading {flags.FLAGS.model}"):
        return hub.load_decoder(flags.FLAGS.model)


def measure(model: Decoder, params: trees.Tree, n: int) -> dict[str, Any]:
    """Both sides at `n` lanes, in turns. Raises `UserError` if the losses of the first step differ
    by more than 1e-4."""
    values = flags.FLAGS
    label, n_turns = (
        f"{values.model}, {n} lanes of {values.rows} x {values.seq_len}",
        values.warmup + values.rounds,
    )
    spec = lora.Spec(values.rank, 2.0 * values.rank)
    config = TrainConfig(
        steps=n_turns, batch_rows=values.rows, seq_len=values.seq_len, loss_chunk=512
    )
    batches = [_batch(seed, model.config.vocab_size) for seed in range(n)]
    with waiting(label, "compiling both sides"):
        lanes, lanes_bill = _lanes(model, params, config, spec, batches)
        single, single_bill = _single(model, params, config, spec, batches[0])
    seconds: dict[str, list[float]] = {"lanes": [], "single": []}
    losses: dict[str, list[float]] = {"lanes": [], "single": []}
    with Progress(label, n_turns, unit="turn") as bar:
        for turn in range(n_turns):
            for name, step in (("lanes", lanes), ("single", single))[:: 1 if turn % 2 else -1]:
                began = time.perf_counter()
                losses[name].append(step())
                seconds[name].append(time.perf_counter() - began)
            bar.advance(
                1, f"{seconds['lanes'][-1]:.2f} s, a single step {seconds['single'][-1]:.2f} s"
            )
    if abs(losses["lanes"][0] - losses["single"][0]) > 1e-4:
        raise UserError(
            f"{label}: first losses {losses['lanes'][0]} and {losses['single'][0]}; the two sides do not do the same work"
        )
    del lanes, single
    gc.collect()
    measured = {name: np.array(taken[values.warmup :]) for name, taken in seconds.items()}
    tokens = n * values.rows * values.seq_len
    return {
        "model": values.model,
        "rows": values.rows,
        "seq_len": values.seq_len,
        "rank": values.rank,
        "lanes": n,
        "tokens_per_second": {
            "lanes": tokens / float(np.median(measured["lanes"])),
            "one_after_another": tokens / n / float(np.median(measured["single"])),
        },
        "ratio": ratio(measured["lanes"], n * measured["single"]),
        "seconds": {name: taken.tolist() for name, taken in measured.items()},
        "compile_seconds": {"lanes": lanes_bill[0], "single": single_bill[0]},
        "bytes": {"lanes": lanes_bill[1], "single": single_bill[1]},
        "base_bytes": trees.n_bytes(params),
    }


def _batch(seed: int, vocab_size: int) -> Batch:
    values = flags.FLAGS
    tokens_BxT1 = (
        np.random.default_rng(seed)
        .integers(3, vocab_size, (values.rows, values.seq_len + 1))
        .astype(np.int32)
    )
    examples = [Example(tokens, np.ones(len(tokens), np.float32)) for tokens in tokens_BxT1]
    return make_batch(
        pack(examples, values.seq_len), seq_len=values.seq_len, batch_rows=values.rows
    )


Bill = tuple[float, int]
"""Seconds of compiling; bytes of the program's arguments and temporaries."""


def _lanes(
    model: Decoder,
    params: trees.Tree,
    config: TrainConfig,
    spec: lora.Spec,
    batches: Sequence[Batch],
) -> tuple[Callable[[], float], Bill]:
    """All lanes' next step, done when it returns; gives the first lane's loss."""
    n = len(batches)
    shapes = lora.lanes.padded_shapes([spec], params)
    task = LaneTask.build(model, params, config, make_mesh(), shapes, n)
    program = task.compile(*task.abstract_inputs(batches[0]))
    scales = lora.lanes.scales(spec, params, shapes)
    stacked = {path: np.broadcast_to(scale, (n, *scale.shape)) for path, scale in scales.items()}
    rates = np.linspace(1e-4, 1e-3, n).astype(np.float32)
    inputs = task.shard_inputs(
        LaneInputs(
            stacked,
            rates,
            np.zeros(n, np.int32),
            np.full(n, config.steps, np.int32),
            np.ones(n, bool),
        )
    )
    batch = shard(jax.tree.map(lambda *leaves: np.stack(leaves), *batches), task.batch_sharding())
    state = task.empty()

    def step() -> float:
        nonlocal state
        state, metrics = jax.block_until_ready(program.step(state, task.frozen, inputs, batch))
        return float(metrics["loss"][0])

    return step, (program.seconds, program.argument_bytes + program.temporary_bytes)


def _single(
    model: Decoder, params: trees.Tree, config: TrainConfig, spec: lora.Spec, batch: Batch
) -> tuple[Callable[[], float], Bill]:
    task = Task.lora(model, params, config, make_mesh(), config.steps, spec)
    program, state = task.compile(batch), task.new_state()
    batch = shard(batch, batch_sharding(make_mesh()))

    def step() -> float:
        nonlocal state
        state, metrics = jax.block_until_ready(program.step(state, task.frozen, batch))
        return float(metrics["loss"])

    return step, (program.seconds, program.argument_bytes + program.temporary_bytes)


def lanes_table(cases: Sequence[Mapping[str, Any]]) -> table.Table:
    def row(case: Mapping[str, Any]) -> tuple[str, ...]:
        n, speed = case["lanes"], case["tokens_per_second"]
        compiling = (
            f"{case['compile_seconds']['lanes']:.1f} / {n * case['compile_seconds']['single']:.1f}"
        )
        memory = f"{case['bytes']['lanes'] / 1e6:,.0f} ({case['bytes']['lanes'] / case['bytes']['single']:.2f}x)"
        return (
            f"{case['model']}, {case['rows']}x{case['seq_len']}",
            f"{n}",
            f"{speed['lanes']:,.0f}",
            f"{speed['one_after_another']:,.0f}",
            f"{table.ratio(case['ratio'])}",
            compiling,
            memory,
        )

    headers = (
        "model, tokens a lane",
        "lanes",
        "together",
        "one by one",
        "ratio",
        "compile s, one / N programs",
        "MB (of a single run)",
    )
    notes = (
        "Tokens/s over all lanes, median step, taken in turns; ratio of the medians [95% bootstrap over rounds], compile time not in it.",
        "MB: the program's arguments and temporaries as XLA plans them, the base among them once.",
    )
    return table.Table(
        "LoRA lanes beside the same runs one after another", headers, tuple(map(row, cases)), notes
    )


def draw(cases: Sequence[Mapping[str, Any]], path: Path) -> None:
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for case in cases:
        lines.setdefault(f"{case['model']}, {case['rows']}x{case['seq_len']}", []).append(case)
    with matplotlib.rc_context(STYLE):
        figure = new_figure(9.0, 3.6)
        speed, memory = figure.subplots(1, 2)
        for (name, of_line), (colour, marker) in zip(
            lines.items(), list(METHOD_STYLE.values())[2:], strict=False
        ):
            n = [case["lanes"] for case in of_line]
            value, low, high = (
                np.array([case["ratio"][key] for case in of_line])
                for key in ("value", "low", "high")
            )
            style = {"color": colour, "marker": marker, "markersize": 5, "label": name}
            speed.errorbar(
                n, value, yerr=np.maximum([value - low, high - value], 0), elinewidth=1, **style
            )
            memory.plot(
                n, [case["bytes"]["lanes"] / case["bytes"]["single"] for case in of_line], **style
            )
        most = max(case["lanes"] for case in cases)
        memory.plot(
            [1, most],
            [1, most],
            color="#999999",
            linestyle=":",
            label="a copy of everything a lane",
        )
        speed.axhline(1, color="#999999", linestyle=":")
        speed.set(xlabel="lanes", ylabel="throughput over one after another", ylim=(0, None))
        memory.set(xlabel="lanes", ylabel="memory over a single run", yscale="log")
        for panel in (speed, memory):
            panel.set_xscale("log", base=2)
            ticks = sorted({case["lanes"] for case in cases})
            panel.set_xticks(ticks, [str(tick) for tick in ticks])
            panel.legend(fontsize=7)
        save_figure(figure, path)


if __name__ == "__main__":
    define_flags()
    run_main(main)
