"""Workers: claim a run, start it as a command, show signs of life, note how it ended; again until
nothing is open.

Exit codes tell preemption from failure: 143 (SIGTERM, after which the experiments save) leaves a
run open and is not counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kafjax.core.errors import UserError
from kafjax.core.paths import is_address, upload
from kafjax.core.progress import say
from kafjax.core.rundir import write_atomic
from kafjax.core.text import visible
from launch import packs
from launch.config import Launch
from launch.ledger import (
    DONE,
    FAILED,
    PENDING,
    PREEMPTED,
    RUNNING,
    Claim,
    Ledger,
    Outcome,
    Pulse,
    State,
)
from launch.spec import Run

GRACE_SECONDS = 300.0  # that an experiment has to save after SIGTERM
_SHOW_SECONDS = 1.0  # in a bucket five times that: each look asks it about every run
_LOOK_SECONDS = 0.1  # between two looks at a process that runs
_N_LAST, _MOST_TAIL_BYTES = 20, 20_000
_PREEMPTED_CODES = (143, -signal.SIGTERM, 130, -signal.SIGINT)
_CHIPS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1"}  # shapes that libtpu can cut out of a host's chips


@dataclasses.dataclass(frozen=True)
class Slot:
    """Resources that one run at a time may use: cores, and devices by their numbers (empty: all
    that it sees)."""

    cores: tuple[int, ...]
    devices: tuple[int, ...] = ()

    def environment(self) -> dict[str, str]:
        """Returns the variables by which CUDA and libtpu show a process some of the devices."""
        if not self.devices:
            return {}
        numbers = ",".join(map(str, self.devices))
        chips = _CHIPS.get(len(self.devices))
        bounds = (
            {"TPU_PROCESS_BOUNDS": "1,1,1", "TPU_CHIPS_PER_PROCESS_BOUNDS": chips} if chips else {}
        )
        return {"CUDA_VISIBLE_DEVICES": numbers, "TPU_VISIBLE_CHIPS": numbers, **bounds}


def slots(config: Launch) -> list[Slot]:
    """Deals the budget of cores and devices to runs.

    Raises:
      UserError: a budget that this machine does not have, or that is too small for one run.
    """
    available = (
        sorted(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else list(range(os.cpu_count() or 1))
    )
    budget = len(available) if config.cores is None else config.cores
    if budget > len(available):
        raise UserError(f"--cores={budget}: this machine has {len(available)} to give")
    if len(set(config.devices)) != len(config.devices):
        raise UserError(f"--devices={','.join(map(str, config.devices))} names a device twice")
    if config.devices and config.devices_per_run > len(config.devices):
        raise UserError(
            f"--devices_per_run={config.devices_per_run}: --devices names {len(config.devices)}"
        )
    by_devices = len(config.devices) // config.devices_per_run if config.devices else None
    each = config.cores_per_run or max(budget // (by_devices or 1), 1)
    if each > budget:
        raise UserError(f"--cores_per_run={each}: the budget is {budget} cores")
    n = min(budget // each, budget if by_devices is None else by_devices)
    per = config.devices_per_run
    return [
        Slot(
            tuple(available[i * each : (i + 1) * each]),
            tuple(config.devices[i * per : (i + 1) * per]),
        )
        for i in range(n)
    ]


def command_of(ledger: Ledger, run: Run, config: Launch) -> list[str]:
    """Lists the words that start a run."""
    words = [
        *config.launcher,
        sys.executable,
        "-m",
        run.module,
        f"--config={ledger.config_file(run)}",
    ]
    return [*words, f"--runs={ledger.run_folders}", f"--name={run.id}", *run.arguments]


class Pool:
    """Runs what is open in a ledger, one run a slot, until all is done or has failed.

    Args:
      git_sha: code that runs are computed by, to be noted.
      environ: variables of the processes beside those of this one.
      programs: program of each run, by id; runs of one may be started together.
    """

    def __init__(
        self,
        ledger: Ledger,
        config: Launch,
        places: Sequence[Slot],
        git_sha: str | None = None,
        environ: Mapping[str, str] | None = None,
        programs: Mapping[str, str] | None = None,
    ):
        self.ledger, self.config, self._git_sha = ledger, config, git_sha
        group = {"WANDB_RUN_GROUP": ledger.folder.name}
        self._environ = {**group, **os.environ, **(environ or {})}
        self._programs = programs or {}
        self._slots, self._stop = places, threading.Event()
        self._error: BaseException | None = None

    def stop(self) -> None:
        """Asks for the end: runs get SIGTERM, save and are left open for other workers."""
        self._stop.set()

    def run(self, show: Callable[[], None]) -> None:
        """Works until nothing is left to do or `stop` is called. Calls `show` every second.

        Raises:
          UserError: the sweep's folder cannot be written.
        """
        threads = [
            threading.Thread(target=self._work, args=(slot,), daemon=True) for slot in self._slots
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            show()
            until = time.monotonic() + _SHOW_SECONDS * (5 if is_address(self.ledger.folder) else 1)
            while time.monotonic() < until and any(thread.is_alive() for thread in threads):
                time.sleep(_LOOK_SECONDS)  # and not `join`, which signals cannot interrupt
        show()
        if self._error is not None:
            raise self._error

    def _work(self, slot: Slot) -> None:
        pulse = Pulse()
        try:
            while not self._stop.is_set() and (claims := self._next(pulse)):
                self._attempt(claims, slot)
                if self.config.only is not None:
                    return
        except BaseException as error:  # told of by the thread that waits
            self._error = error
            self._stop.set()

    def _next(self, pulse: Pulse) -> list[Claim]:
        """Waits for a run to claim, and claims those that can share its program. Empty when there
        will be none: all are settled, or a failed one ends the sweep."""
        while not self._stop.is_set():
            states = {
                run.id: self.ledger.state(run, self.config.retries) for run in self.ledger.runs
            }
            names = [state.name for state in states.values()]
            if self.config.fail_fast and FAILED in names:
                return []
            for run, name in zip(self.ledger.runs, names, strict=True):
                if name in (PENDING, RUNNING) and (claim := self._claim(run, pulse)) is not None:
                    return [claim, *self._beside(claim, states, pulse)]
            if PENDING not in names and (RUNNING not in names or not self.config.wait):
                return []
            self._stop.wait(min(self.config.lease_seconds / 5, 2.0))
        return []

    def _claim(self, run: Run, pulse: Pulse) -> Claim | None:
        return self.ledger.claim(
            run, pulse, retries=self.config.retries, lease_seconds=self.config.lease_seconds
        )

    def _beside(self, first: Claim, states: Mapping[str, State], pulse: Pulse) -> list[Claim]:
        """Claims open runs that share a program with the run of `first`, as many as leave some for each slot.
        A run that has failed goes alone, so that it takes no other with it."""
        id = first.run.id
        program = self._programs.get(id, id)
        if program == id or states[id].count(FAILED):
            return []
        others = [
            run
            for run in self.ledger.runs
            if run.id != id
            and self._programs.get(run.id) == program
            and states[run.id].name in (PENDING, RUNNING)
            and not states[run.id].count(FAILED)
        ]
        most = min(self.config.lanes, -(-(1 + len(others)) // len(self._slots))) - 1
        claims: list[Claim] = []
        for run in others:
            if len(claims) < most and (claim := self._claim(run, pulse)) is not None:
                claims.append(claim)
                for earlier in (first, *claims):  # whether a run is free may take a while to know
                    earlier.beat(len(claims))
        return claims

    def _attempt(self, claims: list[Claim], slot: Slot) -> None:
        runs, began = [claim.run for claim in claims], time.monotonic()
        if len(runs) == 1:
            command = command_of(self.ledger, runs[0], self.config)
        else:
            files = {run.id: self.ledger.config_file(run) for run in runs}
            command = packs.command(self.ledger.run_folders, runs, files)
            say("sweep", f"{len(runs)} runs share a program: {', '.join(run.id for run in runs)}")
            for claim in claims[1:]:
                write_atomic(claim.log, f"in one program with {runs[0].id}: {claims[0].log}\n")
        with Output(claims[0].log) as output:
            process = self._start(command, slot, output)
            lost, asked = self._watch(process, claims, output)
            for claim in claims:
                if claim.run.id in lost:
                    say("sweep", f"{claim.run.id}: another worker has taken it over")
                else:
                    seconds = (time.monotonic() - began) / len(claims)
                    self._end(claim, process.returncode, asked, seconds, len(claims), output)

    def _start(self, command: list[str], slot: Slot, output: Output) -> subprocess.Popen:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output.file,
                stderr=subprocess.STDOUT,
                env={**self._environ, **slot.environment()},
                start_new_session=True,  # Ctrl-C in the terminal reaches it through us, once
            )
        except OSError as error:
            raise UserError(f"cannot start {command[0]}: {error.strerror or error}") from error
        if hasattr(os, "sched_setaffinity"):
            with contextlib.suppress(OSError):  # it may have ended
                os.sched_setaffinity(process.pid, slot.cores)
        return process

    def _end(
        self, claim: Claim, code: int, asked: bool, seconds: float, packed: int, output: Output
    ) -> None:
        """Notes how a run's attempt ended."""
        run = claim.run
        if packed > 1 and (self.ledger.run_folders / run.id / "result.json").exists():
            code = 0
        elif packed > 1 and code == 0:
            code = 1  # the program has left it out
        how = _how(code, asked)
        lines = output.last_lines() if how != DONE else ()
        # a program tells of each of its runs by name
        lines = tuple(line for line in lines if run.id in line) or lines
        if how == FAILED and code < 0:
            lines = (*lines, f"killed by signal {-code} ({signal.strsignal(-code)})")
        outcome = Outcome(how, code, round(seconds, 3), lines, self._git_sha, packed)
        claim.end(outcome)
        if how == FAILED:
            say(
                "sweep",
                f"{run.id}: attempt {claim.number} failed: {outcome.last_line} ({claim.log} has more)",
            )
        elif how == PREEMPTED:
            say("sweep", f"{run.id}: preempted; it goes on where it was when it is started again")

    def _watch(
        self, process: subprocess.Popen, claims: list[Claim], output: Output
    ) -> tuple[set[str], bool]:
        """Waits for the process with signs of life. Returns the ids of the runs that were lost to
        another worker, and whether it was asked to end."""
        pause = claims[0].lease_seconds / 5
        beats, next_beat = 0, time.monotonic() + pause
        lost: set[str] = set()
        deadline = None
        while True:
            try:
                process.wait(_LOOK_SECONDS)
                return lost, deadline is not None
            except subprocess.TimeoutExpired:
                pass
            now = time.monotonic()
            if now >= next_beat:
                beats, next_beat = beats + 1, now + pause
                lost |= {claim.run.id for claim in claims if not claim.beat(beats)}
                output.show()
            if deadline is None and (lost or self._stop.is_set()):
                process.terminate()
                deadline = now + GRACE_SECONDS
            elif deadline is not None and now > deadline:
                process.kill()


class Output:
    """Output of an attempt: a file, which in a bucket is a copy of one of this machine."""

    def __init__(self, log: Path):
        self._log = log
        here = tempfile.NamedTemporaryFile(prefix="kafjax-log-") if is_address(log) else None
        self.file: Any = open(log, "wb") if here is None else here
        self._shown = 0

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        self.show()
        self.file.close()

    def show(self) -> None:
        """Uploads what is new in a log of a bucket."""
        n_bytes = os.fstat(self.file.fileno()).st_size
        if is_address(self._log) and n_bytes > self._shown:
            with contextlib.suppress(OSError):  # the next time it may be reached
                upload(Path(self.file.name), self._log)
                self._shown = n_bytes

    def last_lines(self) -> tuple[str, ...]:
        with open(self.file.name, "rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - _MOST_TAIL_BYTES, 0))
            lines = file.read().decode(errors="replace").splitlines()
        return tuple(visible(line) for line in lines if line.strip())[-_N_LAST:]


def follow(ledger: Ledger, run: Run, config: Launch) -> int:
    """Starts a run as one of its later processes, which keep no ledger. Returns its exit code;
    SIGTERM goes on to it."""
    if ledger.state(run, config.retries).name == DONE:
        return 0
    process = subprocess.Popen(command_of(ledger, run, config), stdin=subprocess.DEVNULL)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: process.terminate())
    code = process.wait()
    return code if code >= 0 else 128 - code


def _how(code: int, asked: bool) -> str:
    if code == 0:
        return DONE
    return PREEMPTED if asked or code in _PREEMPTED_CODES else FAILED
