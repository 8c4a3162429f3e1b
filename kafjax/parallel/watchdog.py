"""Detection of a process that holds up the others: each writes down the step that it has reached,
and all read."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

import jax

from kafjax.core import paths
from kafjax.core.errors import UserError
from kafjax.core.rundir import write_atomic

STALL_SECONDS = 60.0


class Watchdog:
    """Reports on stderr, once per stall, the process that stays behind: `with Watchdog(folder) as
    dog: ... dog.reached(step)`.

    All processes step together, so one that stops (a disk, a data source, a swapping host) stops
    all, and nothing else tells which it was. The folder has to be shared by the processes. Notes
    are files, since JAX's coordination service is part of process 0 and stalls with it. The first
    live process reads the notes of all and reports. Any other only checks for a live one before it,
    so that few files are read. With one process it does nothing.

    Args:
      folder: of the run.
      stall_seconds: without a step, before a line is written; `STALL_SECONDS` by default.
    """

    def __init__(self, folder: Path, stall_seconds: float | None = None):
        self._folder = folder / "heartbeats"
        self._stall = STALL_SECONDS if stall_seconds is None else stall_seconds
        self._me, self._n = jax.process_index(), jax.process_count()
        self._left = threading.Event()
        self._threads = [
            threading.Thread(target=work, daemon=True) for work in (self._write, self._watch)
        ]
        self._step, self._pause = 0, self._stall / 10

    def __enter__(self) -> Watchdog:
        if self._n > 1:
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._left.set()
        if self._n > 1:
            for thread in self._threads:
                thread.join()
            paths.delete(self._file(self._me))
            if not paths.is_address(self._folder):  # a bucket has no folders
                with contextlib.suppress(OSError):  # the last one takes the folder with it
                    self._folder.rmdir()

    def reached(self, step: int) -> None:
        """Notes that this process begins `step` (counted from 1). A thread writes it down, so the
        call costs nothing."""
        self._step = step

    def _file(self, process: int) -> Path:
        return self._folder / str(process)

    def _write(self) -> None:
        while not self._left.wait(self._pause):
            with contextlib.suppress(UserError):  # a full disk is told of where it matters
                write_atomic(self._file(self._me), f"{self._step} {time.time_ns()}")

    def _watch(self) -> None:
        began = time.monotonic()
        others = [_Seen(self._file(process), began) for process in range(self._n)]
        told: list[int] = []
        ahead, ahead_since = 0, began  # the furthest step that anyone has written down
        while not self._left.wait(self._pause):
            now = time.monotonic()
            if any(other.look(now) < self._stall / 2 for other in others[: self._me]):
                continue  # one before this one tells
            for other in others[self._me :]:
                other.look(now)
            furthest = max(other.step for other in others)
            if furthest != ahead:
                ahead, ahead_since = furthest, now
            # when a stall ends, some write of it before others
            behind = now - ahead_since >= 3 * self._pause
            stuck = [p for p, other in enumerate(others) if now - other.step_since >= self._stall]
            # Others wait for a process within a step too; a live one still writes, a frozen one
            # does not.
            stalled = [
                p
                for p in stuck
                if (behind and others[p].step < furthest)
                or now - others[p].beat_since >= self._stall / 2
            ]
            for p in stalled:
                if p not in told:
                    next_step = max(furthest, others[p].step + 1)
                    self._tell(
                        f"process {p} has not reached step {next_step} for {now - others[p].step_since:.0f} s"
                    )
            if not stalled and len(stuck) == self._n and told != stuck:
                self._tell(f"no process has got past step {furthest} for {self._stall:.0f} s")
            told = stalled or (stuck if len(stuck) == self._n else [])

    def _tell(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class _Seen:
    """The note of one process, and how long it has not changed."""

    def __init__(self, file: Path, now: float):
        self._file = file
        self._text = self._read()  # of a run before, if there is anything
        self.step, self.step_since, self.beat_since = 0, now, now

    def look(self, now: float) -> float:
        """Reads the note and returns the seconds since it changed."""
        text = self._read()
        if text and text != self._text:
            self._text, self.beat_since = text, now
            step = int(text.split()[0])
            if step != self.step:
                self.step, self.step_since = step, now
        return now - self.beat_since

    def _read(self) -> str:
        try:
            return paths.read(self._file).decode()
        except OSError:
            return ""
