"""Starts several real processes on this machine, as a scheduler would on several hosts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("worker.py")
TIMEOUT = 120  # seconds, of a test's processes; far more than they take


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(
    command: Sequence[str | Path], n: int, folder: Path, *, devices: int = 1, environ: dict[str, str] | None = None
) -> list[subprocess.Popen]:
    """`n` processes of `python COMMAND`, with `devices` devices each; what they print goes to files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    address = f"127.0.0.1:{free_port()}"
    common = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "JAX_COORDINATOR"))},
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        # Compiling takes most of a tiny model's time, so it optimises little.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        **(environ or {}),
    }
    started = []
    for i in range(n):
        own = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(n), "JAX_PROCESS_ID": str(i)}
        with open(folder / f"{i}.out", "w") as out, open(folder / f"{i}.err", "w") as err:
            arguments = [sys.executable, "-W", "ignore", *map(str, command)]
            started.append(subprocess.Popen(arguments, cwd=ROOT, env={**common, **own}, stdout=out, stderr=err))
    return started


def ended(started: Sequence[subprocess.Popen], folder: Path, timeout: float = TIMEOUT) -> list[Ended]:
    """Waits for all of them; none is left behind."""
    deadline = time.monotonic() + timeout
    try:
        codes = [process.wait(max(deadline - time.monotonic(), 0.1)) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [Ended(code, (folder / f"{i}.out").read_text(), (folder / f"{i}.err").read_text()) for i, code in enumerate(codes)]


def run(command: Sequence[str | Path], n: int, folder: Path, **options: object) -> list[Ended]:
    """`start`, and all of them have to end well."""
    outcomes = ended(start(command, n, folder, **options), folder)
    for i, outcome in enumerate(outcomes):
        assert outcome.code == 0, f"process {i} of {n}: {outcome}"
    return outcomes


def wait_until(true: Callable[[], bool], started: Sequence[subprocess.Popen], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not true():
        assert time.monotonic() < deadline, f"waited {TIMEOUT} s until {what}"
        assert all(process.poll() is None for process in started), f"a process ended before {what}"
        time.sleep(0.02)
