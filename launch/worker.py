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
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kafjax.core.errors import UserError
from kafjax.core.progress import say
from kafjax.core.text import visible
from launch.config import Launch
from launch.ledger import DONE, FAILED, PENDING, PREEMPTED, RUNNING, Claim, Ledger, Outcome, Pulse
from launch.spec import Run

GRACE_SECONDS = 300.0  # that an experiment has to save after SIGTERM
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
    """

    def __init__(
        self,
        ledger: Ledger,
        config: Launch,
        places: Sequence[Slot],
        git_sha: str | None = None,
        environ: Mapping[str, str] | None = None,
    ):
        self.ledger, self.config, self._git_sha = ledger, config, git_sha
        self._environ = {**os.environ, **(environ or {})}
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
            until = time.monotonic() + 1.0
            while time.monotonic() < until and any(thread.is_alive() for thread in threads):
                time.sleep(_LOOK_SECONDS)  # and not `join`, which signals cannot interrupt
        show()
        if self._error is not None:
            raise self._error

    def _work(self, slot: Slot) -> None:
        pulse = Pulse()
        try:
            while not self._stop.is_set() and (claim := self._next(pulse)) is not None:
                self._attempt(claim, slot)
                if self.config.only is not None:
                    return
        except BaseException as error:  # told of by the thread that waits
            self._error = error
            self._stop.set()

    def _next(self, pulse: Pulse) -> Claim | None:
        """Waits for a run to claim. None when there will be none: all are settled, or a failed one
        ends the sweep."""
        while not self._stop.is_set():
            names = [self.ledger.state(run, self.config.retries).name for run in self.ledger.runs]
            if self.config.fail_fast and FAILED in names:
                return None
            for run, name in zip(self.ledger.runs, names, strict=True):
                if name in (PENDING, RUNNING):
                    claim = self.ledger.claim(
                        run,
                        pulse,
                        retries=self.config.retries,
                        lease_seconds=self.config.lease_seconds,
                    )
                    if claim is not None:
                        return claim
            if PENDING not in names and (RUNNING not in names or not self.config.wait):
                return None
            self._stop.wait(min(self.config.lease_seconds / 5, 2.0))
        return None

    def _attempt(self, claim: Claim, slot: Slot) -> None:
        run, began = claim.run, time.monotonic()
        command = command_of(self.ledger, run, self.config)
        try:
            with open(claim.log, "wb") as log:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**self._environ, **slot.environment()},
                    start_new_session=True,  # Ctrl-C in the terminal reaches it through us, once
                )
        except OSError as error:
            raise UserError(f"cannot start {command[0]}: {error.strerror or error}") from error
        if hasattr(os, "sched_setaffinity"):
            with contextlib.suppress(OSError):  # it may have ended
                os.sched_setaffinity(process.pid, slot.cores)
        lost, asked = self._watch(process, claim)
        seconds = time.monotonic() - began
        if lost:
            say("sweep", f"{run.id}: another worker has taken it over")
            return
        how = _how(process.returncode, asked)
        lines = _tail(claim.log) if how != DONE else ()
        if how == FAILED and process.returncode < 0:
            lines = (
                *lines,
                f"killed by signal {-process.returncode} ({signal.strsignal(-process.returncode)})",
            )
        outcome = Outcome(how, process.returncode, round(seconds, 3), lines, self._git_sha)
        claim.end(outcome)
        if how == FAILED:
            say(
                "sweep",
                f"{run.id}: attempt {claim.number} failed: {outcome.last_line} ({claim.log} has more)",
            )
        elif how == PREEMPTED:
            say("sweep", f"{run.id}: preempted; it goes on where it was when it is started again")

    def _watch(self, process: subprocess.Popen, claim: Claim) -> tuple[bool, bool]:
        """Waits for the process with signs of life. Returns whether the run was lost to another
        worker, and whether it was asked to end."""
        beats, next_beat = 0, time.monotonic() + claim.lease_seconds / 5
        lost, deadline = False, None
        while True:
            try:
                process.wait(_LOOK_SECONDS)
                return lost, deadline is not None
            except subprocess.TimeoutExpired:
                pass
            now = time.monotonic()
            if now >= next_beat:
                beats, next_beat = beats + 1, now + claim.lease_seconds / 5
                lost = lost or not claim.beat(beats)
            if deadline is None and (lost or self._stop.is_set()):
                process.terminate()
                deadline = now + GRACE_SECONDS
            elif deadline is not None and now > deadline:
                process.kill()


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


def _tail(log: Path) -> tuple[str, ...]:
    with open(log, "rb") as file:
        file.seek(max(os.fstat(file.fileno()).st_size - _MOST_TAIL_BYTES, 0))
        lines = file.read().decode(errors="replace").splitlines()
    return tuple(visible(line) for line in lines if line.strip())[-_N_LAST:]
