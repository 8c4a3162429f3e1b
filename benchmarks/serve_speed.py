"""Speed of answering beside transformers: prefill and greedy decoding, kafjax and torch in turns.

    python -m benchmarks.serve_speed                                   five cases, Gemma 3 270M, float32
    python -m benchmarks.serve_speed --dtype=bfloat16                  in bfloat16, on both sides
    python -m benchmarks.serve_speed --cases=decode_1 --tokens=128     one case, longer

Both sides get the same weights, prompts and threads. `prefill_B`: B prompts of --prompt tokens, the
logits of each one's last token, and the cache of keys and values kept. `decode_B`: --tokens greedy
tokens behind B prompts of 16 tokens, as one call. torch runs with its own choice of attention
(SDPA) and asks for the last logits alone. The first round checks that both sides do the same: the
same greedy tokens in float32, the same logits within a tolerance in prefill.

The floor is what reading the weights alone takes: bytes of the weights that a step reads, over the
memory bandwidth that a sum over 1 GB reaches on this machine. Decoding at batch 1 cannot be faster.

The ratio is that of the median times; its interval is a 95% bootstrap over rounds. Writes
OUT/serve_speed_DTYPE.json and .md.
"""

from __future__ import annotations

import functools
import gc
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from absl import flags

from benchmarks.ours import our_decode, our_prefill
from benchmarks.peers import hf_model
from benchmarks.theirs import their_decode, their_prefill
from benchmarks.turns import in_turns, listed, ratio, sample_tokens
from kafjax import hub
from kafjax.core import trees
from kafjax.core.errors import UserError, nearest, run_main
from kafjax.core.progress import say, waiting
from kafjax.core.rundir import environment, write_atomic, write_json
from kafjax.evaluation import table
from kafjax.models import Decoder

CASES = {
    "prefill_1": ("prefill", 1),
    "prefill_8": ("prefill", 8),
    "decode_1": ("decode", 1),
    "decode_8": ("decode", 8),
    "decode_32": ("decode", 32),
}
DTYPES = {"float32": (jnp.float32, torch.float32), "bfloat16": (jnp.bfloat16, torch.bfloat16)}
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}  # of logits, over their largest magnitude
SHORT_PROMPT = 16
OURS, THEIRS = "kafjax", "torch"


def define_flags() -> None:
    """Defines the flags. Not done at import: tests import several benchmarks, whose flags share
    names."""
    flags.DEFINE_string("model", "gemma3-270m", "gemma3-270m, or a folder of a decoder.")
    flags.DEFINE_list("cases", list(CASES), f"What is measured: {', '.join(CASES)}.")
    flags.DEFINE_integer("prompt", 256, "Prefill: tokens per prompt.", lower_bound=1)
    flags.DEFINE_integer("tokens", 64, "Decoding: tokens per reply.", lower_bound=2)
    flags.DEFINE_integer("rounds", 7, "Rounds measured.", lower_bound=1)
    flags.DEFINE_integer("warmup", 2, "Rounds before those.", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", list(DTYPES), "Type of weights and activations.")
    flags.DEFINE_string("out", "benchmarks/results", "Folder that the results are written to.")


def main(_: list[str]) -> None:
    values = flags.FLAGS
    for case in values.cases:
        if case not in CASES:
            raise UserError(f"unknown case '{case}'. {nearest(case, CASES)}")
    torch.set_num_threads(os.cpu_count() or 1)
    ours, theirs = DTYPES[values.dtype]
    with waiting("model", f"loading {values.model}"):
        model, params = hub.load_decoder(values.model, dtype=ours)
        params = jax.tree.map(lambda x: x.astype(ours), params)
        peer = hf_model(model, params, theirs).eval()
        tokens_N = sample_tokens(
            hub.tokenizer(values.model), (32 * max(values.prompt, SHORT_PROMPT),)
        )
    floor = seconds_a_token(params)
    rows = {case: measure(case, model, params, peer, tokens_N) for case in values.cases}
    settings = {name: values[name].value for name in ("model", "dtype", "prompt", "tokens")}
    settings |= {"threads": torch.get_num_threads(), "rounds": values.rounds}
    versions = {package.__name__: package.__version__ for package in (torch, transformers)}
    versions["jax"] = jax.__version__
    text = table.render([speed_table(rows, floor)], [listed(settings), listed(versions)])
    result = {"settings": settings, "cases": rows, "floor_seconds": floor, "versions": versions}
    file = Path(values.out) / f"serve_speed_{values.dtype}"
    write_json(file.with_suffix(".json"), result | {"environment": environment()})
    write_atomic(file.with_suffix(".md"), text)
    print(f"\n{text}")


def seconds_a_token(params: trees.Tree) -> float:
    """Time to read all weights once, at the bandwidth that a sum over 1 GB reaches here."""
    block = np.ones(2**27, np.float64)
    taken = []
    for _ in range(3):
        began = time.perf_counter()
        jax.block_until_ready(_total(block))
        taken.append(time.perf_counter() - began)
    return trees.n_bytes(params) / (block.nbytes / min(taken))


@jax.jit
def _total(block: jax.Array) -> jax.Array:
    return block.sum()


def measure(
    case: str,
    model: Decoder,
    params: trees.Tree,
    peer: transformers.PreTrainedModel,
    tokens_N: np.ndarray,
) -> dict[str, Any]:
    """Runs both sides of a case in turns. Returns their rates in tokens/s, and the ratio."""
    values, (kind, batch) = flags.FLAGS, CASES[case]
    length = values.prompt if kind == "prefill" else SHORT_PROMPT
    prompts_BxT = tokens_N[: batch * length].reshape(batch, length)
    with waiting(case, "compiling"):
        if kind == "prefill":
            ours, (theirs, _) = (
                our_prefill(model, params, prompts_BxT),
                their_prefill(peer, prompts_BxT),
            )
        else:
            ours, (theirs, _) = (
                our_decode(model, params, prompts_BxT, values.tokens),
                their_decode(peer, prompts_BxT, values.tokens),
            )
    sides = {OURS: ours, THEIRS: theirs}
    check = functools.partial(check_same_work, case, values.dtype)
    seconds, _ = in_turns(case, sides, values.rounds, values.warmup, check)
    made = batch * (length if kind == "prefill" else values.tokens)
    row = {name: rates(made, taken) for name, taken in seconds.items()}
    sides.clear()
    gc.collect()
    say(case, ", ".join(f"{name} {row[name]['median']:.1f} tokens/s" for name in row))
    return row | {"ratio": ratio(seconds[OURS], seconds[THEIRS])}


def rates(made: int, seconds: np.ndarray) -> dict[str, float]:
    """Tokens/s of the median, the slowest and the fastest round."""
    return {
        "median": float(made / np.median(seconds)),
        "min": float(made / seconds.max()),
        "max": float(made / seconds.min()),
    }


def check_same_work(case: str, dtype: str, first: Mapping[str, np.ndarray]) -> None:
    """Raises `UserError` unless both sides have the same logits, or in float32 the same tokens."""
    ours, theirs = first[OURS], first[THEIRS]
    if CASES[case][0] == "decode":
        # in bfloat16 two near candidates may change places, and all that follows with them
        same = dtype == "bfloat16" or bool((ours == theirs).all())
    else:
        scale = np.abs(theirs).max()
        same = bool(np.abs(ours - theirs).max() <= TOLERANCE[dtype] * scale)
    if not same:
        raise UserError(f"{case}: the two sides give other results: they do not do the same work")


def speed_table(rows: Mapping[str, Mapping[str, Any]], floor: float) -> table.Table:
    def speed(side: Mapping[str, float]) -> str:
        return f"{side['median']:.0f} [{side['min']:.0f}, {side['max']:.0f}]"

    def of_floor(case: str, row: Mapping[str, Any]) -> str:
        kind, batch = CASES[case]
        return "-" if kind == "prefill" else f"{row[OURS]['median'] * floor / batch:.0%}"

    return table.Table(
        "Answering, tokens/s",
        ("work", OURS, THEIRS, f"{OURS} / {THEIRS}", "of the floor"),
        tuple(
            (
                f"{CASES[case][0]}, batch {CASES[case][1]}",
                *(speed(row[side]) for side in (OURS, THEIRS)),
                table.ratio(row["ratio"]),
                of_floor(case, row),
            )
            for case, row in rows.items()
        ),
        (
            "Median round [slowest, fastest]; ratio of the medians [95% bootstrap over rounds]. The sides took turns in one process.",
            f"Of the floor: steps/s over those that reading all weights once would allow ({1e3 * floor:.1f} ms a step).",
        ),
    )


if __name__ == "__main__":
    define_flags()
    run_main(main)
