"""The lock of a folder in a bucket: an object beside it that its holder rewrites every few seconds.

It is written only on the condition that it is still the object that was read, so of many that ask
one gets it, and a holder that was thought dead finds out. It is free when it is empty, or has not
changed for `SILENCE` seconds. Clocks are not compared.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from kafjax.core import paths
from kafjax.core.progress import say

BEAT = 5.0  # seconds between two signs of life
SILENCE = 30.0  # seconds without one after which the lock is free
_LOOK = 1.0  # seconds between two looks at a lock that may be free
_seen: dict[str, tuple[str | None, float]] = {}
TAKEN_OVER = 143  # exit code of a holder that lost its lock: it was not its fault


@dataclasses.dataclass
class BucketLock:
    """A lock that this process holds, with the number of its users."""

    path: Path
    object: Path
    version: str
    thread: int
    users: int = 1
    pid: int = dataclasses.field(default_factory=os.getpid)
    ended: threading.Event = dataclasses.field(default_factory=threading.Event)
    writing: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def keep_alive(self) -> None:
        """Shows signs of life until the lock is dropped. Ends the process if another has it: what
        that writes must not be mixed with what this would write."""
        number = 0
        while not self.ended.wait(BEAT):
            number += 1
            try:
                with self.writing:
                    alive = self.ended.is_set() or self._write(_record(number))
            except OSError:
                continue  # a bucket that cannot be reached now may be at the next beat
            if not alive:
                print(
                    f"error: {self.path} was taken over by {_named(_read(self.object))}, as this "
                    f"process showed no sign of life for {SILENCE:g} s",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(TAKEN_OVER)

    def drop(self) -> None:
        """Frees the lock."""
        self.ended.set()
        with self.writing:
            self._write(b"")

    def _write(self, content: bytes) -> bool:
        if not paths.swap(self.object, self.version, content):
            # an answer that got lost: the object may be ours all the same
            if not content or paths.read(self.object) != content:
                return False
        self.version = paths.version(self.object) or ""
        return True


def look(path: Path) -> None:
    """Notes what the lock of a folder is now, so that a later `take` has less to wait. Raises
    `OSError`."""
    where = _object(path)
    _seen_since(where, paths.version(where))


def take(path: Path) -> BucketLock | str:
    """Takes the lock of a folder, or returns a text that names its holder. Raises `OSError`."""
    where = _object(path)
    before = paths.version(where)
    held = b"" if before is None else paths.read(where)
    if held:
        until = _seen_since(where, before) + SILENCE
        if (left := until - time.monotonic()) > 0:
            say("lock", f"{where}: watching for {left:.0f} s whether {_named(held)} is alive")
        while time.monotonic() < until:
            time.sleep(_LOOK)
            if paths.version(where) != before:
                now = _read(where)
                return _named(now) if now else "a process that has just ended"
    content = _record(0)
    if not paths.swap(where, before, content):
        return _named(_read(where))
    lock = BucketLock(path, where, paths.version(where) or "", threading.get_ident())
    threading.Thread(target=lock.keep_alive, daemon=True).start()
    return lock


def _object(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _seen_since(where: Path, version: str | None) -> float:
    """Returns the time from which on this process has seen the object in this version."""
    known = _seen.get(str(where))
    if known is None or known[0] != version:
        known = _seen[str(where)] = (version, time.monotonic())
    return known[1]


def _record(beat: int) -> bytes:
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "beat": beat}).encode()


def _read(where: Path) -> bytes:
    try:
        return paths.read(where)
    except OSError:
        return b""


def _named(content: bytes) -> str:
    try:
        record: Any = json.loads(content)
        return f"process {record['pid']} on {record['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
