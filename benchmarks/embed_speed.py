"""Embedding speed beside sentence-transformers: sentences/s of MiniLM, both sides in turns.

    python -m benchmarks.embed_speed                          24 and 100 words, float32 and bfloat16
    python -m benchmarks.embed_speed --threads=1 --texts=64   on a machine that is at work
    python -m benchmarks.embed_speed --words=24 --dtypes=float32

Both sides get the same texts, weights and threads, and do all of it: tokens, batches, vectors of
length 1. Texts have between three quarters and five quarters of the words named. First the vectors
of both are compared: a difference above 1e-5 in float32, or a cosine below 0.99 in bfloat16, ends
the benchmark. Then the sides take turns, every other round backwards.

Beside wall time stands processor time, which other processes disturb less; with several threads it
also counts those that spin. A ratio is one of medians over rounds (above 1, kafjax is faster), with
a 95% bootstrap interval. Writes OUT/embed_speed.json and .md.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from benchmarks.theirs import encoder
from benchmarks.turns import in_turns, ratio
from benchmarks.work import texts_of
from kafjax import hub
from kafjax.core.errors import UserError, nearest, run_main
from kafjax.core.progress import say, waiting
from kafjax.core.rundir import environment, write_atomic, write_json
from kafjax.evaluation import table
from kafjax.retrieval import Embedder
from kafjax.retrieval.embed import DTYPES

SIDES = ("kafjax", "sentence-transformers")


def define_flags() -> None:
    """Defines the flags. Not done at import: tests import several benchmarks, whose flags share
    names."""
    flags.DEFINE_list("words", ["24", "100"], "Words of a text.")
    flags.DEFINE_list("dtypes", list(DTYPES), f"Of the products: {', '.join(DTYPES)}.")
    flags.DEFINE_integer("texts", 256, "Texts embedded in a turn.", lower_bound=8)
    flags.DEFINE_integer("rounds", 7, "Rounds measured.", lower_bound=2)
    flags.DEFINE_integer("threads", os.cpu_count() or 1, "Cores of both sides.", lower_bound=1)
    flags.DEFINE_string("out", "benchmarks/results", "Folder that the results are written to.")


def main(_: list[str]) -> None:
    values = flags.FLAGS
    for dtype in values.dtypes:
        if dtype not in DTYPES:
            raise UserError(f"--dtypes: unknown '{dtype}'. {nearest(dtype, DTYPES)}")
    if not all(words.isdecimal() and int(words) for words in values.words):
        raise UserError(f"--words={','.join(values.words)} are not numbers above 0")
    cores = sorted(os.sched_getaffinity(0))[: values.threads]
    os.sched_setaffinity(0, cores)  # before JAX counts them
    cases = {
        f"{words} words, {dtype}": measure(int(words), dtype, len(cores))
        for dtype in values.dtypes
        for words in values.words
    }
    settings = {"texts": values.texts, "rounds": values.rounds, "threads": len(cores)}
    text = table.render([speed_table(cases, settings)], [])
    out = Path(values.out)
    write_json(
        out / "embed_speed.json",
        {"settings": settings, "cases": cases, "environment": environment()},
    )
    write_atomic(out / "embed_speed.md", text)
    print(f"\n{text}")


def measure(words: int, dtype: str, threads: int) -> dict[str, Any]:
    """Seconds of each side in each round, and their ratios."""
    values, label = flags.FLAGS, f"{words} words, {dtype}"
    texts = texts_of(words, values.texts)
    with waiting(label, "loading and compiling both sides"):
        sides = {"kafjax": ours(dtype), "sentence-transformers": encoder(dtype, threads)}
        vectors = {name: side(texts) for name, side in sides.items()}
    check_same_work(label, dtype, *vectors.values())

    def processor_seconds(side: Callable[[Sequence[str]], np.ndarray]) -> float:
        used = time.process_time()
        side(texts)
        return time.process_time() - used

    turns = {name: functools.partial(processor_seconds, sides[name]) for name in SIDES}
    wall, processor = in_turns(label, turns, values.rounds, warmup=0)
    return {
        "wall": {name: taken.tolist() for name, taken in wall.items()},
        "processor": processor,
        "ratio": ratio(*(wall[name] for name in SIDES)),
        "processor_ratio": ratio(*(np.array(processor[name]) for name in SIDES)),
    }


def ours(dtype: str) -> Callable[[Sequence[str]], np.ndarray]:
    model, params = hub.load("minilm")
    return Embedder(model, params, hub.tokenizer("minilm"), dtype=dtype).embed


def check_same_work(label: str, dtype: str, a_NxD: np.ndarray, b_NxD: np.ndarray) -> None:
    difference = float(np.abs(a_NxD - b_NxD).max())
    cosine = float((a_NxD * b_NxD).sum(axis=1).min())
    say(label, f"vectors differ by {difference:.1e} at most, lowest cosine {cosine:.6f}")
    if (difference > 1e-5) if dtype == "float32" else cosine < 0.99:
        raise UserError(f"{label}: the vectors differ, so that the sides do not do the same work")


def speed_table(cases: Mapping[str, Mapping[str, Any]], settings: Mapping[str, int]) -> table.Table:
    def row(name: str, case: Mapping[str, Any]) -> tuple[str, ...]:
        rates = [settings["texts"] / float(np.median(case["wall"][side])) for side in SIDES]
        ratios = [table.ratio(case[key]) for key in ("ratio", "processor_ratio")]
        return (name, *(f"{rate:,.0f}" for rate in rates), *ratios)

    return table.Table(
        f"Embedding speed, sentences/s: MiniLM, {settings['texts']} texts, {settings['threads']} threads",
        ("texts", *SIDES, "ratio", "ratio of processor time"),
        tuple(row(name, case) for name, case in cases.items()),
        (
            f"Medians of {settings['rounds']} rounds in turns; ratios above 1: kafjax is faster [95% bootstrap over rounds].",
        ),
    )


if __name__ == "__main__":
    define_flags()
    run_main(main)
