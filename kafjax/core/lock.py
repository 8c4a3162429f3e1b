"""One writer a folder: a lock with host and pid beside it, which the kernel releases when its
holder dies.

The lock of `runs/NAME` is the file `runs/.NAME.lock`. Its holder has it under `flock` and rewrites
it every few seconds. Whoever wants it meanwhile is refused and told who holds it. The guarantees:

- Processes of one machine, in containers too: one writer at a time. The lock of a dead one is free
  at once, because the kernel drops it. Process ids appear in messages only: containers repeat them.
- Machines on a shared file system with a working `flock` (NFS, GPFS, Lustre): the same.
- Machines whose `flock` does not reach each other (FUSE mounts of buckets): a lock is taken over
  after `SILENCE` seconds in which its file did not change. Clocks are not compared. Two machines
  that ask within the same second may both get it.
- Folders in buckets: `kafjax/core/bucket_lock.py`.

Readers take no lock and write nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import functools
import json
import os
import socket
import threading
import time
import uuid
import weakref
from pathlib import Path
from typing import Any

from kafjax.core import bucket_lock
from kafjax.core.bucket_lock import BucketLock
from kafjax.core.errors import UserError
from kafjax.core.paths import as_path, is_address, refuse_address
from kafjax.core.progress import say

BEAT = 5.0  # seconds between two signs of life
SILENCE = 20.0  # seconds without one after which the lock of another machine is free
_LOOK = 0.2  # seconds between two looks at a lock that is waited for
_NO_FLOCK = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}

MOUNT = (
    "what this needs is only read and written in folders of this machine; copy it there, or mount "
    "the bucket and give its path"
)

_guard = threading.Lock()
_files: dict[Path, _File | BucketLock] = {}


class Lock:
    """A lock held by this process until `release`, or until its block, the object or the process
    ends."""

    def __init__(self, file: _File | BucketLock):
        self.release = weakref.finalize(self, _drop, file)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def hold(path: Path | str, *, wait_seconds: float = 0.0) -> Lock:
    """Takes the lock of a file or folder: `with hold(path): ...`. The path need not exist; its
    parent folders are made.

    The lock is re-entrant within a thread.

    Args:
      wait_seconds: how long to wait for another writer before giving up.

    Raises:
      UserError: another process or thread is writing (naming host and pid), the disk refuses, or
        `path` is an address.
    """
    path = as_path(path)
    if not is_address(path):
        refuse_address(path, MOUNT)
        path = path.resolve()
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            with _guard:
                taken = _take(path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        if not isinstance(taken, str):
            return Lock(taken)
        if time.monotonic() >= deadline:
            raise UserError(
                f"{path} is being written by {taken}; wait until it is done, or stop it"
            )
        time.sleep(_LOOK)


@dataclasses.dataclass
class _File:
    """An open lock file with the number of its users in this process."""

    path: Path
    fd: int
    thread: int
    users: int = 1
    pid: int = dataclasses.field(default_factory=os.getpid)
    ended: threading.Event = dataclasses.field(default_factory=threading.Event)

    def beat(self, number: int) -> None:
        # Always of one length, so that no reader sees the end of a longer one.
        record = {
            "host": socket.gethostname(),
            "pid": self.pid,
            "machine": _machine(),
            "beat": f"{number:012d}",
        }
        os.pwrite(self.fd, json.dumps(record).encode().ljust(512), 0)

    def keep_alive(self) -> None:
        number = 0
        while not self.ended.wait(BEAT):
            number += 1
            with contextlib.suppress(OSError):  # a full disk is told of where it matters
                self.beat(number)


def _take(path: Path) -> _File | BucketLock | str:
    """Returns the lock, or a text that names its holder."""
    if (mine := _files.get(path)) is not None and mine.pid == os.getpid():
        if mine.thread != threading.get_ident():
            return "another thread of this process"
        mine.users += 1
        return mine
    if is_address(path):
        taken = bucket_lock.take(path)
        if not isinstance(taken, str):
            _files[path] = taken
        return taken
    lock = path.with_name(f".{path.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        holder = _refused_by(fd, lock)
        if holder is not None:
            os.close(fd)
            return holder
        file = _File(path, fd, threading.get_ident())
        file.beat(0)
    except BaseException:
        os.close(fd)
        raise
    threading.Thread(target=file.keep_alive, daemon=True).start()
    _files[path] = file
    return file


def _refused_by(fd: int, lock: Path) -> str | None:
    """Names the other holder of the open file; None if it is ours now."""
    reached = True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _named(_record(fd))
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        reached = False
    if not _is_same_file(fd, lock):
        # it took the file with it: the next try makes a new one
        return "a process that has just ended"
    record = _record(fd)
    if record and not (reached and record.get("machine") == _machine()):
        say("lock", f"{lock}: watching for {SILENCE:g} s whether {_named(record)} is alive")
        until = time.monotonic() + SILENCE
        while time.monotonic() < until:
            time.sleep(_LOOK)
            if not _is_same_file(fd, lock):
                return "a process that has just ended"
            if (now := _record(fd)) != record:
                return _named(now or record)
    return None


def _drop(file: _File | BucketLock) -> None:
    if file.pid != os.getpid():
        return  # a forked child: the lock is its parent's
    with _guard:
        file.users -= 1
        if file.users:
            return
        _files.pop(file.path, None)
        if isinstance(file, BucketLock):
            with contextlib.suppress(OSError):  # it is free after a while, too
                file.drop()
            return
        file.ended.set()
        lock = file.path.with_name(f".{file.path.name}.lock")
        with contextlib.suppress(OSError):
            if _is_same_file(file.fd, lock):
                lock.unlink()
        os.close(file.fd)


def _record(fd: int) -> dict[str, Any]:
    try:
        record = json.loads(os.pread(fd, 4096, 0) or b"{}")
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _named(record: dict[str, Any]) -> str:
    return (
        f"process {record['pid']} on {record['host']}"
        if {"pid", "host"} <= record.keys()
        else "another process"
    )


def _is_same_file(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


@functools.cache
def _machine() -> str:
    """Identifies the running kernel: hostnames of containers repeat from machine to machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{uuid.getnode():x}"
