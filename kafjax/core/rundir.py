"""The run directory: truth on disk. Every file appears whole or not at all; a run is known by the hash of its config."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kafjax.core.errors import UserError
from kafjax.core.lock import Lock, hold, refuse_address

PROBE_BYTES = 1_000_000
OLD_SECONDS = 3600.0  # a temporary file of this age has no writer any more
PACKAGES = ("kafjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scann", "tokenizers")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file through a temporary neighbour and a rename, so that a kill leaves the old file or the new one.

    Raises `UserError` if it cannot be written; the old file is then as it was.
    """
    temporary = temporary_beside(path)
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_temporaries(path, older_than=OLD_SECONDS)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes `folder` when the block ends well: a kill or an error leaves none that looks finished.

    Raises `UserError` if `folder` is a file or holds something, cannot be written, or is being written by another process.
    """
    with hold(folder):
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise UserError(f"{folder} exists already; choose another folder, or delete it")
        clear_temporaries(folder)
        made = temporary_beside(folder.absolute())
        try:
            made.mkdir(parents=True)
            try:
                yield made
                os.replace(made, folder)
            finally:
                shutil.rmtree(made, ignore_errors=True)
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error.strerror or error}") from error


def temporary_beside(path: Path) -> Path:
    """Names a file or folder to be made beside `path` and renamed: hidden, and unique over processes, containers and hosts."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def clear_temporaries(path: Path, *, older_than: float = 0.0) -> None:
    """Deletes what killed writers of `path` have left beside it.

    Args:
      older_than: seconds since their last change. 0 is for the holder of the lock of `path`: nobody else is writing then.
    """
    path = path.absolute()
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime >= older_than:
                _delete(left)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises `UserError` naming file and line where the JSON is broken."""
    try:
        return json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid JSON (no UTF-8 text)") from error


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Appends a row. A last line that a kill or a full disk cut short is dropped, so that the new one starts a line.

    Raises `UserError` if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
            file.write(_line(row))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def read_jsonl(path: Path, *, skip_broken_tail: bool = False) -> list[dict[str, Any]]:
    """Reads one JSON object a line; blank lines are skipped.

    Raises `UserError` naming file and line of the first broken one. `skip_broken_tail` forgives the last line:
    in our own logs a kill can cut it short.
    """
    rows: list[dict[str, Any]] = []
    # Bytes, because a line may be cut within a character; not splitlines, because U+2028 and U+0085 may stand in a string.
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if skip_broken_tail and number == len(lines):
                break
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "no UTF-8 text"
            raise UserError(f"{path}:{number}: not valid JSON ({reason})") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: expected a JSON object, got {type(row).__name__}")
        rows.append(row)
    return rows


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_atomic(path, b"".join(map(_line, rows)))


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def config_hash(config: dict[str, Any]) -> str:
    """First 12 hex digits of the sha256 of the config as canonical JSON."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run's directory, `root/name`.

    `lock` makes this process its only writer, until `close` or the end of this object; None for who only reads.
    """

    path: Path
    lock: Lock | None = dataclasses.field(default=None, compare=False, repr=False)

    def close(self) -> None:
        """Lets others write."""
        if self.lock is not None:
            self.lock.release()

    def file(self, name: str) -> Path:
        return self.path / name

    def log(self, **row: Any) -> None:
        """Appends a row to `metrics.jsonl`, stamped with the time in seconds since the epoch."""
        append_jsonl(self.file("metrics.jsonl"), {"time": round(time.time(), 3), **row})


def find_run(root: Path, name: str, config: dict[str, Any]) -> Run:
    """`root/name` for `config`: free, or the same run to be resumed. Writes nothing.

    Raises `UserError` if the name is no plain folder name or the directory holds a run of another config (naming the first
    difference), so that two experiments never mix in one folder.
    """
    refuse_address(root)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"--name='{name}' is not a plain folder name (letters, digits, '.', '_', '-')")
    run = Run(root / name)
    stored = run.file("config.json")
    if stored.exists():
        old = read_json(stored)
        for key in sorted({*old, *config}):
            if old.get(key) != json.loads(json.dumps(config.get(key))):
                raise UserError(
                    f"{run.path} holds a run with {key}={old.get(key)!r}, not {config.get(key)!r}; "
                    "pick another --name, or delete that folder"
                )
    return run


def open_run(root: Path, name: str, config: dict[str, Any]) -> Run:
    """`find_run`, to be written by this process alone; a new run gets its folder with `config.json`.

    Deletes temporary files that killed writers have left in the folder.

    Raises:
      UserError: as `find_run`; another process writes this run; or the disk takes no files there.
    """
    lock = hold(find_run(root, name, config).path)
    run = Run(find_run(root, name, config).path, lock)  # once more: another may have made it meanwhile
    try:
        run.path.mkdir(exist_ok=True)
        for left in run.path.rglob(".*.tmp"):
            _delete(left)
        check_writable(run.path)
    except OSError as error:
        raise UserError(f"cannot write {run.path}: {error.strerror or error}") from error
    if not run.file("config.json").exists():
        write_json(run.file("config.json"), config)
    return run


def check_writable(folder: Path, n_bytes: int = PROBE_BYTES) -> None:
    """Raises `UserError` for a folder that takes no file, or a disk with less than `n_bytes` free: before hours are spent.

    Quotas and file size limits are noticed at `PROBE_BYTES` only, by writing them.
    """
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise UserError(f"cannot write {folder}: {free / 1e6:,.0f} MB are free on that disk, {n_bytes / 1e6:,.0f} MB are needed")
    probe = temporary_beside(folder / "probe")
    try:
        try:
            probe.write_bytes(bytes(PROBE_BYTES))
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error


def environment() -> dict[str, Any]:
    """What a number depends on beside the config: versions, platform, git commit (None outside a checkout)."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    here = Path(__file__).parent
    git = ["git", "-C", str(here)]
    try:
        sha = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = bool(subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout)
    except (OSError, subprocess.CalledProcessError):
        sha, dirty = None, None
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "packages": versions,
        "git_sha": sha,
        "git_dirty": dirty,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
