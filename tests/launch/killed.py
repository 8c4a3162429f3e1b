"""A sweep that is killed many times at random, and then finished by workers that race.

python -m tests.launch.killed      24 trainings of a tiny model, killed 20 times: what it took, and how far it is from one left alone
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import safetensors.numpy

from kafjax.core.rundir import read_json, read_jsonl
from launch import estimate, packs
from launch.config import Launch
from launch.ledger import DONE, PENDING, Ledger
from launch.worker import Pool, Slot

N_RUNS, N_KILLS, N_RACING = 24, 20, 3
_PATIENCE_SECONDS = 20.0
_context = multiprocessing.get_context("forkserver")  # starts a worker in milliseconds
_context.set_forkserver_preload(["launch.worker", "launch.packs"])


def work(folder: Path, core: int, lanes: int) -> None:
    """Works as `launch.sweep` does, until nothing is open or SIGTERM comes."""
    ledger = Ledger.read(folder)
    shared = packs.programs(ledger.runs) if lanes > 1 else {}
    pool = Pool(ledger, Launch(lease_seconds=1.0, lanes=lanes), [Slot((core,))], programs=shared)
    signal.signal(signal.SIGTERM, lambda *_: pool.stop())
    pool.run(lambda: None)


def start(folder: Path, number: int, lanes: int) -> multiprocessing.process.BaseProcess:
    cores = sorted(os.sched_getaffinity(0))
    worker = _context.Process(target=work, args=(folder, cores[number % len(cores)], lanes))
    worker.start()
    return worker


def kill(worker: multiprocessing.process.BaseProcess, how: str) -> bool:
    """Ends a worker as a preemption does, or alone, or with all that it has started. False if it
    had ended before."""
    if not worker.is_alive():
        return False
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(worker.pid)
        victims = process.children(recursive=True) if how == "machine" else []
        for victim in (*victims, process):
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.send_signal(signal.SIGTERM if how == "preempted" else signal.SIGKILL)
    worker.join()
    return True


def disturb(folder: Path, kills: int, seconds: tuple[float, float], lanes: int) -> Counter[str]:
    """Starts a worker and ends it a random time after it has begun to work, again and again; then
    lets several finish.

    Returns how many were ended, by how.
    """
    rng, ended = random.Random(0), Counter()
    for number in range(kills):
        worker = start(folder, number, lanes)
        _until_it_works(Ledger.read(folder), worker)
        time.sleep(rng.uniform(*seconds))
        how = rng.choice(["preempted", "worker", "machine"])
        ended[how] += kill(worker, how)
    racing = [start(folder, number, lanes) for number in range(N_RACING)]
    for worker in racing:
        worker.join()
    return ended


def _until_it_works(ledger: Ledger, worker: multiprocessing.process.BaseProcess) -> None:
    """Waits for the worker's first attempt: earlier it has nothing that could be preempted. It may
    get none while orphans of killed workers are at the last runs."""
    until = time.monotonic() + _PATIENCE_SECONDS
    while worker.is_alive() and time.monotonic() < until:
        tried = (one for run in ledger.runs for one in ledger.state(run, 2).attempts)
        if any(one.pid == worker.pid for one in tried):
            return
        time.sleep(0.05)


def attempts(ledger: Ledger) -> Counter[str]:
    """Counts the attempts of all runs, by how they ended."""
    outcomes = [one.outcome for run in ledger.runs for one in ledger.state(run, 2).attempts]
    return Counter("lost" if outcome is None else outcome.how for outcome in outcomes)


def main() -> None:
    from experiments.configs.finetune import Finetune
    from kafjax.core.config import changed
    from launch import sweep
    from launch.spec import Sweep, product
    from tests import compiling, tiny

    os.environ.update(compiling.environment())
    with tempfile.TemporaryDirectory() as there:
        world = Path(there)
        tiny.write_gemma(world / "gemma")
        tiny.write_corpus(world / "corpus")
        folders = {"model": str(world / "gemma"), "corpus": str(world / "corpus")}
        sizes = {"steps": 20, "batch_rows": 2, "seq_len": 64, "checkpoint_every": 5}
        points = product(rank=[2, 4], lr=[1e-3, 3e-3, 1e-2], seed=range(4))
        runs = Sweep(changed(Finetune(), **folders, **sizes), points).runs()
        whole, killed = (Ledger(world / name, runs) for name in ("alone", "killed"))
        for ledger in (whole, killed):
            ledger.create()
        print(sweep.dry_run(whole, Launch()).rpartition("runs are left.")[2].strip(), flush=True)
        began = time.monotonic()
        start(whole.folder, 0, 8).join()
        print(f"Left alone: {time.monotonic() - began:.0f} s.", flush=True)
        print(_estimate(whole), flush=True)
        began = time.monotonic()
        ended = disturb(killed.folder, N_KILLS, (1.0, 10.0), 8)
        print(f"Killed {ended.total()} times ({dict(ended)}): {time.monotonic() - began:.0f} s.")
        print(f"Attempts: {dict(attempts(killed))}; alone: {dict(attempts(whole))}.")
        print(f"All done: {all(killed.state(run, 2).name == DONE for run in runs)}.")
        pairs = [(whole.run_folders / run.id, killed.run_folders / run.id) for run in runs]
        losses, weights = zip(*(_differences(*pair) for pair in pairs), strict=True)
        print(
            f"Largest difference of a step's loss {max(losses):.1e}, of a weight {max(weights):.1e}."
        )


def _estimate(ledger: Ledger) -> str:
    """Says what the dry run would have said after the first program, and what the others took."""
    states = {run.id: ledger.state(run, 2) for run in ledger.runs}
    after = {
        run.id: states[run.id] if number < 8 else dataclasses.replace(states[run.id], name=PENDING)
        for number, run in enumerate(ledger.runs)
    }
    costs = estimate.costs(ledger.runs, after, None)
    left = ledger.runs[8:]
    said = sum(costs[run.id].seconds or 0.0 for run in left)
    took = sum(states[run.id].attempts[-1].outcome.seconds for run in left)
    return f"After 8 runs the dry run says {said:.0f} s for the other {len(left)}; they took {took:.0f} s."


def _differences(one: Path, other: Path) -> tuple[float, float]:
    """Returns the largest relative difference of losses, and the largest of weights."""
    a, b = (
        {row["step"]: row["loss"] for row in read_jsonl(run / "metrics.jsonl")}
        for run in (one, other)
    )
    assert a.keys() == b.keys()
    assert read_json(one / "config.json") == read_json(other / "config.json")
    x, y = (safetensors.numpy.load_file(run / "adapter.safetensors") for run in (one, other))
    loss = max(abs(a[step] - b[step]) / a[step] for step in a)
    return loss, max(float(np.abs(x[name] - y[name]).max()) for name in x)


if __name__ == "__main__":
    sys.exit(main())
