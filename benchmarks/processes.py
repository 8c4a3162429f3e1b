"""Sides in processes of their own: started, asked, ended; and both of a row in turns."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.turns import in_turns
from kafjax.core.errors import UserError
from kafjax.core.progress import waiting
from kafjax.hub import cache_dir

ROOT = Path(__file__).parents[1]
WARM, COLD, PROCESS = "warm", "cold", "process"
"""Times a turn: one more call of a process that stays; the first call of a new process, compiling
in it, but neither its imports nor loading; a new process from its start to its first result."""


class Missing(Exception):
    """A side's package that is not installed."""


@dataclasses.dataclass(frozen=True)
class Job:
    """`MODULE:FUNCTION` that prepares a `Side`, and its arguments."""

    name: str
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Process:
    """A side in its process. `facts` are the side's own."""

    def __init__(self, job: Job, folder: Path, *, cached: bool = True):
        """Starts it in the existing `folder`. Raises `Missing`, or `UserError` if it fails."""
        self.folder, self._name = folder, job.name
        self.began = time.perf_counter()
        command = [sys.executable, "-m", "benchmarks.side", job.name, json.dumps(job.arguments)]
        self._log = (folder / "log").open("w")
        self._process = subprocess.Popen(
            [*command, str(folder)],
            cwd=ROOT,
            env=_environment(cached),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        told = self._told()
        if "missing" in told:
            self.end()
            raise Missing(told["missing"])
        self.facts = told["facts"]

    def call(self) -> dict[str, float]:
        """Calls the side once. Returns its `seconds`, and the `peak` of its memory in bytes."""
        with contextlib.suppress(BrokenPipeError):  # it has ended, of which `_told` tells
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        return self._told()

    def result(self) -> np.ndarray:
        """Result of the first call."""
        return np.load(self.folder / "result.npy")

    def end(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _told(self) -> dict[str, Any]:
        if line := self._process.stdout.readline():
            return json.loads(line)
        code = self._process.wait()
        last = (self.folder / "log").read_text(errors="replace").strip().splitlines()[-1:]
        raise UserError(f"{self._name} has ended with code {code}: {' '.join(last)}")


def _environment(cached: bool) -> dict[str, str]:
    """Compiled programs are kept in a folder, as the experiments do, unless a cold call is timed."""
    kept = {
        "JAX_COMPILATION_CACHE_DIR": str(cache_dir() / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
    }
    others = {name: value for name, value in os.environ.items() if name not in kept}
    return others | (kept if cached else {"JAX_ENABLE_COMPILATION_CACHE": "false"})


@contextlib.contextmanager
def started(job: Job, folder: Path, *, cached: bool = True) -> Iterator[Process]:
    """Process of a job that ends with the block."""
    folder.mkdir(parents=True, exist_ok=True)
    process = Process(job, folder, cached=cached)
    try:
        yield process
    finally:
        process.end()


def once(job: Job, folder: Path) -> np.ndarray:
    """Result of a job's single call."""
    with started(job, folder) as process:
        process.call()
        return process.result()


@dataclasses.dataclass(frozen=True)
class Measured:
    """One side of a row: `seconds` of its turns, its highest `peak` of memory in bytes, its
    facts."""

    seconds: list[float]
    peak: float
    facts: Mapping[str, Any]


def measure(
    label: str,
    jobs: Mapping[str, Job],
    timed: str,
    turns: int,
    warmup: int,
    check: Callable[..., None],
    folder: Path,
) -> dict[str, Measured]:
    """Runs the sides of a row in turns.

    Args:
      timed: what a turn is: `WARM`, `COLD` or `PROCESS`.
      check: takes the first result of each side; raises if they do not do the same.

    Raises:
      Missing: a side's package is not installed.
      UserError: a side failed.
    """
    facts: dict[str, Mapping[str, Any]] = {}
    calls: dict[str, Callable[[], dict[str, float]]] = {}
    with contextlib.ExitStack() as stack:
        for name, job in jobs.items():
            if timed == WARM:
                with waiting(label, f"loading and compiling {name}"):
                    process = stack.enter_context(started(job, folder / name))
                calls[name], facts[name] = process.call, process.facts
            else:
                calls[name] = _fresh(name, job, timed, folder / name, facts)

        def compare(_: Mapping[str, Any]) -> None:
            check(*(np.load(folder / name / "result.npy") for name in jobs))

        _, told = in_turns(label, calls, turns, warmup, compare)
    return {
        name: Measured(
            [turn["seconds"] for turn in told[name][warmup:]],
            max(turn["peak"] for turn in told[name]),
            facts[name],
        )
        for name in jobs
    }


def _fresh(
    name: str, job: Job, timed: str, folder: Path, facts: dict[str, Mapping[str, Any]]
) -> Callable[[], dict[str, float]]:
    def turn() -> dict[str, float]:
        with started(job, folder, cached=timed != COLD) as process:
            told = process.call()
            facts[name] = process.facts
            return (
                told if timed == COLD else told | {"seconds": time.perf_counter() - process.began}
            )

    return turn
