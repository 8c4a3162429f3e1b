"""Overhead of a step outside its own computation: laying out its batch, the watchdog, the check for
SIGTERM.

    python -m benchmarks.input_speed
    python -m benchmarks.input_speed --batch_rows=64 --seq_len=1024 --repeats=200

Batches are made as in training (`training.feed`), from texts in memory and from packed rows on the
disk, and waited for, although in training the device works meanwhile. The watchdog costs a step
nothing; its threads write a note and read others ten times per `STALL_SECONDS`, so that their share
of the time is what one such turn takes over its pause. Numbers are medians of single calls, with a
95% bootstrap interval.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from absl import flags

from kafjax.core.errors import run_main
from kafjax.core.rundir import environment, write_atomic
from kafjax.parallel import make_mesh
from kafjax.parallel.preemption import Preemption
from kafjax.parallel.watchdog import STALL_SECONDS, Watchdog
from kafjax.training import Batches, Example
from kafjax.training.feed import Source, feed
from kafjax.training.packed import PackedRows, write_rows
from kafjax.training.step import batch_sharding

N_ROWS = 2048  # of the data set


def define_flags() -> None:
    """Defines the flags. Not done at import: tests import several benchmarks, whose flags share
    names."""
    flags.DEFINE_integer("batch_rows", 8, "Rows per step of this process.", lower_bound=1)
    flags.DEFINE_integer("seq_len", 1024, "Tokens per row.", lower_bound=32)
    flags.DEFINE_integer("repeats", 100, "Calls measured of each.", lower_bound=2)
    flags.DEFINE_integer(
        "processes", 256, "Processes whose notes the watchdog reads.", lower_bound=1
    )


def main(_: list[str]) -> None:
    values = flags.FLAGS
    with tempfile.TemporaryDirectory() as folder:
        for name, call in calls(Path(folder), values.batch_rows, values.seq_len, values.processes):
            low, middle, high = milliseconds(call, values.repeats)
            print(f"{name:<40} {middle:9.3f} ms   ({low:.3f} to {high:.3f}, n = {values.repeats})")
            if name.startswith("watchdog: a turn"):
                print(f"{'':<40} {100 * middle / (1e3 * STALL_SECONDS / 10):9.4f} % of the time")
    print(
        ", ".join(
            f"{key} {value}" for key, value in environment().items() if isinstance(value, str | int)
        )
    )


def calls(
    folder: Path, batch_rows: int, seq_len: int, processes: int
) -> Iterator[tuple[str, Callable[[int], object]]]:
    """Returns the measured calls by name. Each takes the number of the repeat."""
    rng = np.random.default_rng(0)
    n_texts = N_ROWS * seq_len // 64
    examples = [
        Example(rng.integers(1, 32_000, n).astype(np.int32), np.ones(n, np.float32))
        for n in rng.integers(16, 112, n_texts)
    ]
    where = batch_sharding(make_mesh("fsdp:1", jax.devices()[:1]), 1)

    def of(source: Source) -> Callable[[int], object]:
        return lambda i: jax.block_until_ready(feed(source, i % (len(source) - 1), where))

    yield (
        f"batch of {batch_rows} x {seq_len}, texts in memory",
        of(Batches([examples], seq_len=seq_len, batch_rows=batch_rows, epochs=1)),
    )
    write_rows(folder / "rows", examples, seq_len)
    packed = PackedRows.open(folder / "rows").batches(batch_rows=batch_rows, epochs=1)
    yield f"batch of {batch_rows} x {seq_len}, packed rows", of(packed)
    yield "tokens of a step, packed rows", lambda i: packed.n_tokens(i % len(packed))
    yield "watchdog: a step", Watchdog(folder).reached
    for process in range(processes):
        write_atomic(folder / "notes" / str(process), "1 1")

    def turn(i: int, read: int) -> None:
        write_atomic(folder / "notes" / "0", f"{i} {time.time_ns()}")
        for process in range(read):
            (folder / "notes" / str(process)).read_text()

    yield f"watchdog: a turn of process 0 of {processes}", lambda i: turn(i, processes)
    yield f"watchdog: a turn of another of {processes}", lambda i: turn(i, 1)
    yield "SIGTERM: a step", Preemption().reached


def milliseconds(call: Callable[[int], object], repeats: int) -> tuple[float, float, float]:
    """(2.5%, median, 97.5%)."""
    call(0)
    taken = []
    for i in range(repeats):
        began = time.perf_counter()
        call(i)
        taken.append(1e3 * (time.perf_counter() - began))
    medians = np.median(np.random.default_rng(0).choice(taken, (2000, repeats)), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return float(low), float(np.median(taken)), float(high)


if __name__ == "__main__":
    define_flags()
    run_main(main)
