"""Nearest neighbours beside raw ScaNN, faiss, hnswlib and usearch: build, save, open, append,
queries/s and latency at recall@10 >= 0.95, memory; and what our layer adds to raw ScaNN.

    python -m benchmarks.search                                  100,000 vectors of 384 numbers
    python -m benchmarks.search --quick                          20,000
    python -m benchmarks.search --count=1000000 --engines=kafjax,scann,faiss
    python -m benchmarks.search --open=1000000                   opening a store of passages, time and memory
    python -m benchmarks.search --show                           the tables of what was measured so far

Vectors are seeded, of unit length, around sqrt(N) centres, with a spectrum that falls like that of
text embeddings; queries are drawn as they are. Each engine runs in a process of its own, which
gives its peak memory (RssAnon where vectors are mapped from a file: the file's pages are the page
cache's). Peers are tuned over a grid to the fastest setting that reaches the recall for these
queries; kafjax stands at its own setting, kafjax-0.95 at that which `--recall=0.95` chose as it was
built, by vectors of its own. Then all processes stay and take turns, every other round backwards,
at one batch of all queries and at single ones. A ratio is one of medians over the rounds, with a
95% bootstrap interval.

The layer is measured inside kafjax's processes: `Index.search`, with its checks and string ids, and
ScaNN's own searcher beneath it, with the same settings, in short turns, by the clock and by the
time of the processor, which what others compute meanwhile does not lengthen.

Measurements are added to OUT/search.json, in place of an earlier one of the same count. OUT/search.md
shows all of them. The peers are the extra [bench].
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from benchmarks.search_engines import ENGINES, RECALL, Engine, K
from benchmarks.turns import ratio
from kafjax.core.errors import UserError, nearest, run_main
from kafjax.core.progress import Progress, say, waiting
from kafjax.core.records import Passage
from kafjax.core.rundir import environment, read_json, write_atomic, write_json
from kafjax.evaluation import table
from kafjax.retrieval import Store
from kafjax.retrieval.exact import ExactIndex
from kafjax.retrieval.folder import size_on_disk
from kafjax.retrieval.tuning import exact_neighbours

N_APPENDED = 1_000
REST_SECONDS = 0.1  # thread pools of the engine before spin for a while
OPENED = "opened"  # the key of that measurement among the results


def define_flags() -> None:
    """Defines the flags. Not done at import: tests import several benchmarks, whose flags share
    names."""
    flags.DEFINE_integer("count", 100_000, "Vectors.", lower_bound=1_000)
    flags.DEFINE_boolean("quick", False, "20,000 vectors.")
    flags.DEFINE_integer("dimension", 384, "Numbers of a vector.", lower_bound=8)
    flags.DEFINE_integer("queries", 1_000, "Queries of a batch.", lower_bound=10)
    flags.DEFINE_integer("singles", 100, "Queries put alone, in each round.", lower_bound=10)
    flags.DEFINE_integer("rounds", 7, "Rounds measured.", lower_bound=2)
    flags.DEFINE_list("engines", list(ENGINES), f"Which to measure: {', '.join(ENGINES)}.")
    flags.DEFINE_integer("seed", 0, "Of vectors and queries.")
    flags.DEFINE_integer("open", 0, "Measure instead opening a store of so many passages.")
    flags.DEFINE_boolean("show", False, "Measure nothing; write the tables anew.")
    flags.DEFINE_string("out", "benchmarks/results", "Folder that the results are written to.")


def main(_: list[str]) -> None:
    values = flags.FLAGS
    file = Path(values.out) / "search.json"
    results = read_json(file) if file.exists() else {"cases": {}}
    if not values.show:
        if unknown := [name for name in values.engines if name not in ENGINES]:
            raise UserError(f"--engines: unknown '{unknown[0]}'. {nearest(unknown[0], ENGINES)}")
        with tempfile.TemporaryDirectory() as folder:
            if values.open:
                results["cases"][OPENED] = opening(Path(folder), values.open, values.dimension)
            else:
                count = 20_000 if values.quick else values.count
                results["cases"][str(count)] = measure(Path(folder), count)
        results["environment"] = environment()
        write_json(file, results)
    if not results["cases"]:
        raise UserError(f"{file} holds no measurement yet; run without --show")
    cases = dict(results["cases"])
    opened = cases.pop(OPENED, None)
    shown = [t for count in sorted(cases, key=int) for t in tables(cases[count])]
    text = table.render(shown + ([opening_table(opened)] if opened else []), [])
    write_atomic(Path(values.out) / "search.md", text)
    print(f"\n{text}")


def measure(folder: Path, count: int) -> dict[str, Any]:
    """All engines over the same vectors: `{"settings": .., "engines": {name: figures}, "layer":
    {name: ratios}}`."""
    values = flags.FLAGS
    with waiting("vectors", f"drawing {count}, and their true neighbours"):
        drawn = clustered(
            count + N_APPENDED + values.queries, values.dimension, values.seed, count**0.5
        )
        vectors, queries = drawn[: count + N_APPENDED], drawn[count + N_APPENDED :]
        np.save(folder / "vectors.npy", vectors)
        np.save(folder / "queries.npy", queries)
        np.save(folder / "truth.npy", exact_neighbours(vectors[:count], queries, K)[1])
        del drawn, vectors, queries
    # OpenMP's threads (faiss, hnswlib) would spin on cores that others compute on.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(_worker(_serve, name, folder)) for name in values.engines
        }
        figures = {}
        for name, worker in workers.items():
            with waiting(name, "building, saving, opening, tuning"):
                figures[name] = _ask(worker, "prepare")
            made = figures[name]
            say(name, f"built in {made['build']:.1f} s, recall {made['recall']:.3f}")
        batches: dict[str, list[float]] = {name: [] for name in workers}
        singles: dict[str, list[float]] = {name: [] for name in workers}
        layer: dict[str, dict[str, list[list[float]]]] = {
            name: {"batch": [], "single": []} for name in workers if name.startswith("kafjax")
        }
        with Progress("turns", values.rounds, unit="round") as bar:
            for n in range(values.rounds):
                for name in list(workers)[:: 1 if n % 2 else -1]:
                    time.sleep(REST_SECONDS)
                    batches[name].append(_ask(workers[name], "batch"))
                    singles[name] += _ask(workers[name], "singles", values.singles)
                    for form, pairs in layer.get(name, {}).items():
                        pairs += _ask(workers[name], "layer", form, n)
                bar.advance(1)
        for name, worker in workers.items():
            figures[name] |= _ask(worker, "append")
            seconds = np.array(batches[name])
            figures[name] |= {
                "batch_seconds": batches[name],
                "qps": values.queries / float(np.median(seconds)),
                "p50": float(np.quantile(singles[name], 0.5)),
                "p99": float(np.quantile(singles[name], 0.99)),
            }
            if "scann" in batches:
                figures[name]["ratio"] = ratio(seconds, np.array(batches["scann"]))
    names = ("dimension", "queries", "singles", "rounds", "seed")
    settings = {"count": count, **{name: values[name].value for name in names}}
    return {
        "settings": {**settings, "threads": os.cpu_count()},
        "engines": figures,
        "layer": {
            name: {
                form + clock: ratio(*np.array(pairs)[:, :, i].T[::-1])  # of ours to raw
                for form, pairs in forms.items()
                for i, clock in enumerate(("", ", processor"))
            }
            for name, forms in layer.items()
        },
    }


def clustered(n: int, dimension: int, seed: int, centres: float) -> np.ndarray:
    """Draws unit vectors float32 `[N, D]` around centres; each centre and each vector's distance
    from it has variances 1, 1/2, 1/3, ... along random axes."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.standard_normal((dimension, dimension)))[0]
    axes = (axes / np.sqrt(np.arange(1, dimension + 1))[:, None]).astype(np.float32)
    centres_CxD = rng.standard_normal((int(centres), dimension), dtype=np.float32) @ axes
    drawn = np.empty((n, dimension), np.float32)
    for start in range(0, n, 100_000):
        rows = slice(start, min(n, start + 100_000))
        own = rng.integers(0, len(centres_CxD), rows.stop - rows.start)
        drawn[rows] = rng.standard_normal((len(own), dimension), dtype=np.float32) @ axes
        drawn[rows] += centres_CxD[own]
        drawn[rows] /= np.linalg.norm(drawn[rows], axis=1, keepdims=True)
    return drawn


def recall(found_QxK: np.ndarray, truth_QxK: np.ndarray) -> float:
    """Share of the true neighbours that were found."""
    return float((found_QxK[:, :, None] == truth_QxK[:, None, :]).any(axis=1).mean())


class _Served:
    """An engine inside its process: one method for each message."""

    def __init__(self, name: str, folder: Path):
        self.engine: Engine = ENGINES[name]()
        self.path = folder / name
        self.vectors = np.load(folder / "vectors.npy", mmap_mode="r")
        self.base, self.queries = self.vectors[:-N_APPENDED], np.load(folder / "queries.npy")
        self.truth = np.load(folder / "truth.npy")

    def prepare(self) -> dict[str, Any]:
        engine, path = self.engine, self.path
        path.mkdir()
        seconds = {
            "build": _seconds(lambda: engine.build(np.array(self.base))),
            "save": _seconds(lambda: engine.save(path)),
        }
        n_bytes = size_on_disk(path)
        self.engine = engine = type(engine)()
        seconds["open"] = _seconds(lambda: engine.open(path))
        return {**seconds, "bytes": n_bytes, **self._tune(), "peak": _memory("VmHWM")}

    def _tune(self) -> dict[str, Any]:
        """Sets the first setting of the grid, which goes from fast to slow, that reaches the
        recall, or the last."""
        for setting in self.engine.grid:
            self.engine.set(setting)
            found = recall(self.engine.search(self.queries), self.truth)
            if found >= RECALL:
                break
        return {"setting": str(setting), "recall": found}

    def batch(self) -> float:
        return _seconds(lambda: self.engine.search(self.queries))

    def singles(self, n: int) -> list[float]:
        return [_seconds(lambda i=i: self.engine.single(self.queries[i : i + 1])) for i in range(n)]

    def layer(self, form: str, turn: int) -> list[list[tuple[float, float]]]:
        """Pairs of ours and raw, each in seconds and in seconds of the processor: of forty batches,
        or of single queries. Short turns, so that what others compute meanwhile meets both."""
        split = [self.queries[i % 10 :: 10] for i in range(40)]
        pairs = []
        for i, queries in enumerate(split if form == "batch" else self.queries[:200, None]):
            calls = [lambda q=queries: self.engine.index.search(q, K)]
            calls.append(lambda q=queries: self.engine.raw(q))
            order = (0, 1) if (turn + i) % 2 else (1, 0)
            taken = {}
            for which in order:
                used = time.process_time()
                taken[which] = (_seconds(calls[which]), time.process_time() - used)
            pairs.append([taken[0], taken[1]])
        return pairs

    def append(self) -> dict[str, float]:
        new = np.array(self.vectors[-N_APPENDED:])
        return {
            "append": _seconds(lambda: self.engine.append(new)),
            "save_again": _seconds(lambda: self.engine.save(self.path)),
        }


def _serve(connection: Connection, name: str, folder: Path) -> None:
    served = _Served(name, folder)
    with contextlib.suppress(EOFError):
        while True:
            message, *arguments = connection.recv()
            connection.send(getattr(served, message)(*arguments))


@contextlib.contextmanager
def _worker(target: Any, *arguments: Any) -> Iterator[Connection]:
    """A process of its own, which is not forked: its memory is all its own."""
    context = multiprocessing.get_context("spawn")
    ours, its = context.Pipe()
    process = context.Process(target=target, args=(its, *arguments), daemon=True)
    process.start()
    its.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join(10)
        process.kill()


def _ask(worker: Connection, *message: Any) -> Any:
    worker.send(message)
    try:
        return worker.recv()
    except EOFError as error:
        raise UserError(f"the process that was asked to {message[0]} has ended") from error


def _seconds(call: Any) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _memory(name: str) -> int:
    """Bytes of this process by Linux: VmHWM, the highest, or RssAnon, what is no file's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise UserError(f"/proc/self/status tells no {name}: this benchmark needs Linux")


def opening(folder: Path, count: int, dimension: int) -> dict[str, Any]:
    """Opens a store of `count` passages, exact engine, each round in a process of its own, files in
    the page cache. Memory is anonymous, so that mapped vectors are not in it."""
    values = flags.FLAGS
    with waiting("store", f"building one of {count} passages"), _worker(_write, folder) as worker:
        _ask(worker, count, dimension, values.seed)
    rounds = []
    with Progress("opening", values.rounds + 1, unit="round") as bar:
        for _ in range(values.rounds + 1):  # the first one fills the page cache
            with _worker(_open, folder) as worker:
                rounds.append(_ask(worker, "open"))
            bar.advance(1, f"{rounds[-1]['seconds']:.2f} s")
    figures = {name: [row[name] for row in rounds[1:]] for name in rounds[0]}
    return {
        "count": count,
        "dimension": dimension,
        "vector_bytes": 4 * count * dimension,
        **figures,
    }


def _write(connection: Connection, folder: Path) -> None:
    count, dimension, seed = connection.recv()
    passages = [
        Passage(f"document-{i // 8}#{i % 8}", f"This is passage {i} of a made-up collection.")
        for i in range(count)
    ]
    index = ExactIndex()
    index.build([passage.id for passage in passages], clustered(count, dimension, seed, 1_000))
    Store(index, passages, "").save(folder / "store")
    connection.send(True)


def _open(connection: Connection, folder: Path) -> None:
    connection.recv()
    before, began, used = _memory("RssAnon"), time.perf_counter(), time.process_time()
    store = Store.load(folder / "store")
    seconds, used = time.perf_counter() - began, time.process_time() - used
    opened = _memory("RssAnon")
    query = np.ones((1, store.index.dimension), np.float32)
    first = _seconds(lambda: store.search(query, K))
    second = _seconds(lambda: store.search(query, K))
    asked = _memory("RssAnon")
    told = {"seconds": seconds, "processor": used, "first_search": first, "next_search": second}
    connection.send({**told, "bytes": opened - before, "bytes_asked": asked - before})


def tables(case: Mapping[str, Any]) -> list[table.Table]:
    s, layer = case["settings"], case["layer"]

    def row(name: str, f: Mapping[str, Any]) -> tuple[str, ...]:
        return (
            name,
            f"{f['recall']:.3f}",
            f"{f['qps']:,.0f}",
            table.ratio(f.get("ratio")),
            f"{1e3 * f['p50']:.2f} / {1e3 * f['p99']:.2f}",
            f"{f['build']:.1f}",
            f"{f['save']:.2f}",
            f"{f['open']:.2f}",
            f"{f['append']:.2f} + {f['save_again']:.2f}",
            f"{f['peak'] / 1e6:,.0f}",
            f"{f['bytes'] / 1e6:,.0f}",
        )

    headers = ("engine", "recall@10", "queries/s", "of ScaNN's", "p50 / p99, ms")
    headers += ("build, s", "save, s", "open, s", "append + save, s", "peak MB", "disk MB")
    notes = [
        f"Queries/s: a batch of {s['queries']}, median of {s['rounds']} rounds in turns; of ScaNN's [95% bootstrap over rounds]. "
        f"p50 / p99: {s['singles']} single queries a round. Append: {N_APPENDED} vectors, and saved again. Peak: with the vectors given.",
        "Settings: " + "; ".join(f"{name} {f['setting']}" for name, f in case["engines"].items()),
    ]
    notes += [
        f"Layer of {name}, its seconds over raw ScaNN's, same structure and settings: "
        + "; ".join(f"{form} {table.ratio(ratio)}" for form, ratio in ratios.items())
        for name, ratios in layer.items()
    ]
    title = f"Search: {s['count']:,} x {s['dimension']} clustered vectors, float32, {s['threads']} threads"
    rows = tuple(row(name, figures) for name, figures in case["engines"].items())
    return [table.Table(title, headers, rows, tuple(notes))]


def opening_table(case: Mapping[str, Any]) -> table.Table:
    def spread(name: str, scale: float = 1.0) -> str:
        taken = np.array(case[name]) * scale
        return f"{np.median(taken):.2f} [{taken.min():.2f}, {taken.max():.2f}]"

    rows = (
        ("open, s", spread("seconds")),
        ("open, s of a processor", spread("processor")),
        ("first search, s", spread("first_search")),
        ("next search, s", spread("next_search")),
        ("memory once opened, MB", spread("bytes", 1e-6)),
        ("memory once searched, MB", spread("bytes_asked", 1e-6)),
    )
    title = f"Opening a store of {case['count']:,} passages, {case['dimension']} numbers each, exact engine"
    note = f"Median [lowest, highest] of {len(case['seconds'])} processes, files in the page cache. Memory: anonymous, "
    note += f"which the mapped vectors ({case['vector_bytes'] / 1e9:.2f} GB) are not."
    return table.Table(title, ("", ""), rows, (note,))


if __name__ == "__main__":
    define_flags()
    run_main(main)
