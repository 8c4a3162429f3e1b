"""Kills a process at any file operation: what `os._exit` leaves is what `kill -9` leaves.

Counted are, under one folder: opening for writing, `fsync`, renaming, deleting, making and removing
folders, as Python does them (Rust and C++ that write files are between two such operations). The
process ends just before the operation it is told.
"""

from __future__ import annotations

import mmap
import os
import re
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path

KILLED = 99
"""The exit code of a process that was killed here."""
_EVENTS = {
    "os.rename": 2,
    "os.remove": 1,
    "os.rmdir": 1,
    "os.mkdir": 2,
    "os.truncate": None,
    "os.link": 2,
}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Counter:
    """A number that a process and its forked children share."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)

    @property
    def value(self) -> int:
        return struct.unpack("q", self._memory[:8])[0]

    def add(self) -> int:
        self._memory[:8] = struct.pack("q", self.value + 1)
        return self.value


def die_at(root: Path, n: int | None, counter: Counter) -> None:
    """Has this process end just before the `n`-th file operation under `root`; None: never. For a
    forked child: it cannot be undone."""
    folder, real_fsync = f"{root.resolve()}/", os.fsync

    def counted(path: object, dir_fd: object = None) -> None:
        try:
            text = os.fsdecode(path)  # type: ignore[arg-type]
        except TypeError:
            return
        if isinstance(dir_fd, int) and dir_fd >= 0 and not text.startswith("/"):
            text = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), text)
        # Locks are made and deleted at any time; what is in them does not matter to the next
        # process.
        if not f"{os.path.abspath(text)}/".startswith(folder) or re.fullmatch(
            r"\..*\.lock", os.path.basename(text)
        ):
            return
        if counter.add() == n:
            os._exit(KILLED)

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            if isinstance(arguments[2], int) and arguments[2] & _WRITES:
                counted(arguments[0])
        elif event in _EVENTS:
            where = _EVENTS[event]
            counted(
                arguments[0],
                arguments[where] if where is not None and len(arguments) > where else None,
            )

    def fsync(fd: int) -> None:
        counted(os.readlink(f"/proc/self/fd/{fd}"))
        real_fsync(fd)

    os.fsync = fsync
    sys.addaudithook(hook)


def in_child(work: Callable[[], None], root: Path, n: int | None = None) -> tuple[int, int]:
    """Runs `work` in a forked child that dies before its `n`-th file operation. Returns its exit
    code and how many it came to."""
    counter = Counter()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(60)  # a child that hangs fails
            die_at(root, n, counter)
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), counter.value
