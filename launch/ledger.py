"""The ledger of a sweep: which runs are done, running, failed or open, as files in the sweep's
folder that any number of workers share.

    FOLDER/sweep.json                      the runs, written once; a grown grid adds to it
    FOLDER/runs/ID/                        the folder of a run, which the experiment writes
    FOLDER/ledger/ID/config.json           the run's configuration, as `--config` reads it
    FOLDER/ledger/ID/attempt-0001.json     a lease: who runs it since when, rewritten every few seconds as a sign of life
    FOLDER/ledger/ID/attempt-0001.log      what the experiment printed
    FOLDER/ledger/ID/outcome-0001.json     how it ended: done, failed or preempted

Files of attempts are only ever added. Whoever makes `attempt-N+1` (atomically: one process can) has
the run, and may do so when N has an outcome that leaves it open, or has shown no sign of life for
the seconds that it promised. Clocks of machines are not compared: a watcher waits that long itself.
So workers may race, die and come back at any time; a worker that was only slow finds the next
attempt and gives up. A run that two processes still write is kept whole by the lock of its folder
(`kafjax/core/lock.py`). The folder may lie in a bucket: an object can be made by one process, too
(`kafjax/core/paths.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from kafjax.core import bucket_lock, paths
from kafjax.core.errors import UserError
from kafjax.core.lock import hold
from kafjax.core.rundir import read_object, write_atomic, write_json
from kafjax.core.schema import Amount, Count, read
from launch.spec import Run

DONE, RUNNING, FAILED, PENDING = "done", "running", "failed", "pending"
PREEMPTED = "preempted"
_SPEC, _RUNS, _LEDGER = "sweep.json", "runs", "ledger"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """End of an attempt.

    `last_lines` are the end of what a failed one printed. `packed` runs shared its program;
    `seconds` are its share of theirs.
    """

    how: Literal["done", "failed", "preempted"]
    exit_code: int
    seconds: Amount
    last_lines: tuple[str, ...] = ()
    git_sha: str | None = None
    packed: Count = 1

    @property
    def last_line(self) -> str:
        errors = [line for line in self.last_lines if line.startswith("error:")]
        return (errors or list(self.last_lines) or [f"exit code {self.exit_code}"])[-1]


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One claim of a run. `outcome` is None while it runs, and for ever if its worker died."""

    number: int
    host: str
    pid: int
    since: float
    outcome: Outcome | None

    @property
    def worker(self) -> str:
        return f"process {self.pid} on {self.host}"


@dataclasses.dataclass(frozen=True)
class State:
    """State of a run."""

    name: Literal["done", "running", "failed", "pending"]
    attempts: tuple[Attempt, ...]

    def count(self, how: str) -> int:
        return sum(
            attempt.outcome is not None and attempt.outcome.how == how for attempt in self.attempts
        )

    @property
    def told(self) -> str:
        """Says who has it and since when, or why it is not done."""
        if self.name == RUNNING:
            last = self.attempts[-1]
            return f"{last.worker} since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(last.since))}"
        if self.name == DONE:
            done = next(a for a in self.attempts if a.outcome is not None and a.outcome.how == DONE)
            shared = f", one of {n} in a program" if (n := done.outcome.packed) > 1 else ""
            return f"{done.outcome.seconds:.3g} s on {done.host}{shared}"
        ended = [attempt.outcome for attempt in self.attempts if attempt.outcome is not None]
        counts = {
            "failed": self.count(FAILED),
            "preempted": self.count(PREEMPTED),
            "lost": len(self.attempts) - len(ended),
        }
        parts = [f"{how} {n} times" if n > 1 else f"{how} once" for how, n in counts.items() if n]
        failures = [outcome for outcome in ended if outcome.how == FAILED]
        return "; ".join([*parts, *(outcome.last_line for outcome in failures[-1:])])


@dataclasses.dataclass(frozen=True)
class _Lease:
    """Record of a run's holder. The defaults are for one who died between making the file and
    filling it."""

    host: str = "an unknown machine"
    pid: int = 0
    since: float = 0.0
    lease_seconds: float = 60.0
    beat: int = 0


@dataclasses.dataclass(frozen=True)
class _StoredSweep:
    runs: tuple[Run, ...]


class Ledger:
    """The runs of a sweep's folder. Making one writes nothing; `create` does."""

    def __init__(self, folder: Path, runs: Sequence[Run]):
        self.folder, self.runs = paths.absolute(folder), tuple(runs)
        self._done: dict[str, State] = {}  # what is done stays done
        self._ended: dict[tuple[str, int], Attempt] = {}  # and an attempt that has ended, too

    @classmethod
    def read(cls, folder: Path) -> Ledger:
        """Opens the sweep that a folder holds. Raises `UserError` if it holds none, or one that
        cannot be read."""
        file = folder / _SPEC
        if not file.exists():
            raise UserError(
                f"{folder} holds no sweep ({_SPEC}); start it with a SPEC, such as rank_rate_seed"
            )
        runs = read(_StoredSweep, file, fix="start the sweep in another folder").runs
        for run in runs:
            if not re.fullmatch(r"[0-9a-f]{12}", run.id) or not re.fullmatch(
                r"[A-Za-z_][\w.]*", run.module
            ):
                raise UserError(
                    f"{file}: '{run.id[:60]}' of '{run.module[:60]}' is no run of a sweep; start it in another folder"
                )
        return cls(folder, runs)

    def check(self) -> None:
        """Refuses a folder that holds another sweep. Runs may be added to a sweep, not taken from
        it.

        Raises:
          UserError: naming the folder, and how many of its runs this sweep lacks.
        """
        if not (self.folder / _SPEC).exists():
            return
        stored = Ledger.read(self.folder)
        missing = {run.id for run in stored.runs} - {run.id for run in self.runs}
        if missing:
            raise UserError(
                f"{self.folder} holds another sweep: {len(missing)} of its {len(stored.runs)} runs are not in this one; "
                f"pick another --folder, or delete that folder"
            )

    def create(self) -> None:
        """Writes the runs into the folder, beside those of an earlier start. Raises `UserError` as
        `check` does, or for a full disk."""
        with hold(self.folder / _SPEC, wait_seconds=60):
            self.check()
            for run in self.runs:
                file = self.config_file(run)
                if not file.exists():
                    write_json(file, dict(run.record))
            stored = {"runs": [dataclasses.asdict(run) for run in self.runs]}
            if not (self.folder / _SPEC).exists() or read_object(self.folder / _SPEC) != json.loads(
                json.dumps(stored)
            ):
                write_json(self.folder / _SPEC, stored)

    @property
    def run_folders(self) -> Path:
        return self.folder / _RUNS

    def entry(self, run: Run) -> Path:
        """Returns the folder of the run's attempts."""
        return self.folder / _LEDGER / run.id

    def config_file(self, run: Run) -> Path:
        """Returns the file of the run's configuration."""
        return self.entry(run) / "config.json"

    def state(self, run: Run, retries: int) -> State:
        """Reads where a run stands. It has failed for good when more than `retries` attempts
        have."""
        if run.id in self._done:
            return self._done[run.id]
        try:
            with paths.telling(self.folder):
                attempts = self._attempts(run)
        except OSError as error:
            raise UserError(f"cannot read {self.entry(run)}: {error.strerror or error}") from error
        state = State(PENDING, attempts)
        if any(attempt.outcome is not None and attempt.outcome.how == DONE for attempt in attempts):
            self._done[run.id] = State(DONE, attempts)
            return self._done[run.id]
        if attempts and attempts[-1].outcome is None:
            return dataclasses.replace(state, name=RUNNING)
        return dataclasses.replace(state, name=FAILED) if state.count(FAILED) > retries else state

    def _attempts(self, run: Run) -> tuple[Attempt, ...]:
        entry = self.entry(run)
        numbers = sorted(
            int(file.stem.rpartition("-")[2]) for file in entry.glob("attempt-[0-9]*.json")
        )
        return tuple(self._attempt(entry, run.id, number) for number in numbers)

    def _attempt(self, entry: Path, id: str, number: int) -> Attempt:
        if (id, number) in self._ended:
            return self._ended[id, number]
        file = _outcome_file(entry, number)
        outcome = (
            read(Outcome, file, fix=f"delete {file} to run it again") if file.exists() else None
        )
        lease = _read_lease(_lease_file(entry, number))
        attempt = Attempt(number, lease.host, lease.pid, lease.since, outcome)
        if outcome is not None:
            self._ended[id, number] = attempt
        return attempt

    def claim(self, run: Run, pulse: Pulse, *, retries: int, lease_seconds: float) -> Claim | None:
        """Takes a run that is open, or whose worker is dead. None if it is neither, or another
        worker was faster.

        Args:
          pulse: what this worker has seen of the others' signs of life.
          lease_seconds: after so many seconds without a sign of life others may take the run.
        """
        state, entry = self.state(run, retries), self.entry(run)
        if state.name in (DONE, FAILED):
            return None
        if state.name == RUNNING:
            folder = self.run_folders / run.id
            silent = pulse.is_silent(_lease_file(entry, state.attempts[-1].number))
            if not silent and paths.is_address(folder):
                with contextlib.suppress(OSError):
                    bucket_lock.look(folder)  # so that it is known to be free once the lease is
            if not silent or not _is_free(folder):
                return None
        number = state.attempts[-1].number + 1 if state.attempts else 1
        claim = Claim(self, run, number, lease_seconds)
        return claim if claim.take() else None


class Pulse:
    """Times at which leases were last seen to change, by this process's own clock."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[bytes, float]] = {}

    def is_silent(self, lease: Path) -> bool:
        """True once the lease has not changed for the seconds that it promised, counted from the
        first look at it."""
        try:
            content = paths.read(lease)
        except OSError:
            return False  # a disk that cannot be reached now is no proof of death
        now = time.monotonic()
        before = self._seen.get(lease)
        if before is None or before[0] != content:
            self._seen[lease] = (content, now)
            return False
        return now - before[1] > _read_lease(lease).lease_seconds


@dataclasses.dataclass(frozen=True)
class Claim:
    """A run that this process has, as attempt `number`."""

    ledger: Ledger
    run: Run
    number: int
    lease_seconds: float
    since: float = dataclasses.field(default_factory=time.time)

    @property
    def log(self) -> Path:
        return self.ledger.entry(self.run) / f"attempt-{self.number:04d}.log"

    def take(self) -> bool:
        """Makes the lease. False if another process has made it. Raises `UserError` if the disk
        refuses."""
        file = _lease_file(self.ledger.entry(self.run), self.number)
        try:
            return paths.create(file, self._content(0))
        except OSError as error:
            raise UserError(f"cannot write {file}: {error.strerror or error}") from error

    def beat(self, number: int) -> bool:
        """Shows a sign of life. False if another worker has taken the run: this one must give it
        up."""
        entry = self.ledger.entry(self.run)
        # a disk that is full or far away now may not be so at the next beat
        with contextlib.suppress(UserError, OSError):
            if paths.exists(_lease_file(entry, self.number + 1)):
                return False
            write_atomic(_lease_file(entry, self.number), self._content(number))
        return True

    def end(self, outcome: Outcome) -> None:
        """Notes how the attempt ended. Raises `UserError` if the disk refuses."""
        write_json(
            _outcome_file(self.ledger.entry(self.run), self.number), dataclasses.asdict(outcome)
        )

    def _content(self, beat: int) -> bytes:
        return json.dumps(
            dataclasses.asdict(
                _Lease(socket.gethostname(), os.getpid(), self.since, self.lease_seconds, beat)
            )
        ).encode()


def _lease_file(entry: Path, number: int) -> Path:
    return entry / f"attempt-{number:04d}.json"


def _outcome_file(entry: Path, number: int) -> Path:
    return entry / f"outcome-{number:04d}.json"


def _read_lease(file: Path) -> _Lease:
    try:
        return read(_Lease, file)
    except UserError:
        return _Lease()


def _is_free(folder: Path) -> bool:
    """False while a process writes the run's folder: a dead worker's experiment may live on, and
    finish."""
    try:
        hold(folder).release()
    except UserError:
        return False
    return True
