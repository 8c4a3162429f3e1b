"""The run directory: truth on disk. Every file appears whole or not at all; a run is known by the
hash of its config."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any

from kafjax.core import paths
from kafjax.core.config import Config, changed, leaves, unused
from kafjax.core.config_record import config_hash, identity, read_record, record
from kafjax.core.errors import UserError
from kafjax.core.lock import MOUNT, Lock, hold
from kafjax.core.paths import temporary_beside

PROBE_BYTES = 1_000_000
NO_RENAME = (
    "this folder is renamed when it is whole, which a bucket cannot; make it in a folder of this "
    "machine, and copy that"
)
OLD_SECONDS = 3600.0  # a temporary file of this age has no writer any more
MOST_JSON_BYTES, MOST_JSONL_BYTES = 200_000_000, 20_000_000_000
PACKAGES = (
    "kafjax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "scann",
    "tokenizers",
)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file so that a kill leaves the old one or the new one.

    Raises `UserError` if it cannot be written; the old file is then as it was.
    """
    try:
        clear_temporaries(path, older_than=OLD_SECONDS)
        paths.write(path, content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def new_folder(folder: Path) -> Generator[Path]:
    """Yields an empty folder that is renamed to `folder` when the block succeeds. A kill or an
    error leaves no finished-looking one.

    Raises `UserError` if `folder` is a file or holds something, cannot be written, is being
    written by another process, or is an address: a bucket has no rename.
    """
    paths.refuse_address(folder, NO_RENAME)
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


def clear_temporaries(path: Path, *, older_than: float = 0.0) -> None:
    """Deletes the temporaries that killed writers of `path` left beside it; in a bucket there are
    none.

    Args:
      older_than: seconds since their last change. Only the holder of the lock of `path` may pass 0.
    """
    if paths.is_address(path):
        return
    path = path.absolute()
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime >= older_than:
                paths.delete(left)


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomic(path, text.encode(errors="backslashreplace"))  # as in `_line`


def read_bytes(path: Path, most: int) -> bytes:
    """Reads a file of at most `most` bytes. Raises `UserError` naming what cannot be read: a
    folder, no permission, too large."""
    try:
        if paths.is_address(path):
            if paths.size(path) > most:
                raise UserError(_too_large(path, most))
            return paths.read(path)
        with open(path, "rb") as file:
            # Asked of the open file, and not by reading one byte too many: for that Python would
            # set aside `most` bytes.
            if os.fstat(file.fileno()).st_size > most:
                raise UserError(_too_large(path, most))
            return file.read()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _too_large(path: Path, most: int) -> str:
    return f"{path} is larger than the {most / 1e6:.0f} MB that such a file may have"


def read_json(path: Path) -> Any:
    """Reads a JSON file from any writer.

    Raises:
      UserError: naming file and line, for a file that cannot be read, is no JSON, nests deeper or
        holds longer numbers than Python reads, or holds NaN or an infinity, which are no JSON.
    """
    data = read_bytes(path, MOST_JSON_BYTES)
    try:
        return json.loads(data, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid JSON (no UTF-8 text)") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {_why(error)}") from error


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object. Raises `UserError` as `read_json` does, and for
    anything else in it."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _why(error: Exception) -> str:
    """Describes in a few words why `json` failed."""
    if isinstance(error, RecursionError):
        return "not valid JSON (nested too deeply)"
    return f"not valid JSON ({'a number of thousands of digits' if 'digits' in str(error) else str(error)[:100]})"


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Appends a row. A last line cut short by a kill or a full disk is dropped first, so that the
    new row starts a line.

    In a bucket it waits for a few seconds, and for whatever is written next. Raises `UserError` if
    it cannot be written.
    """
    try:
        if paths.is_address(path):
            paths.append(path, _line(row))
            return
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

    Raises `UserError` naming file and line of the first broken one. `skip_broken_tail` forgives the
    last line: in our own logs a kill can cut it short.
    """
    rows: list[dict[str, Any]] = []
    # Bytes, because a line may be cut within a character; not splitlines, because U+2028 and U+0085
    # may stand in a string.
    lines = read_bytes(path, MOST_JSONL_BYTES).removesuffix(b"\n").split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=_nothing)
        except (ValueError, RecursionError) as error:
            if skip_broken_tail and number == len(lines):
                break
            if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
                reason = error.msg if isinstance(error, json.JSONDecodeError) else "no UTF-8 text"
                raise UserError(f"{path}:{number}: not valid JSON ({reason})") from error
            raise UserError(f"{path}:{number}: {_why(error)}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: expected a JSON object, got {type(row).__name__}")
        rows.append(row)
    return rows


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_atomic(path, b"".join(map(_line, rows)))


def _nothing(name: str) -> None:
    """Reads NaN and infinities, which logs of older releases hold, as null."""


def _line(row: dict[str, Any]) -> bytes:
    # JSON has no NaN: a loss that is none is null. Lone surrogates, which file names may hold, have
    # no UTF-8: an escape is JSON's own.
    return (
        json.dumps(_finite(row), ensure_ascii=False, allow_nan=False).encode(
            errors="backslashreplace"
        )
        + b"\n"
    )


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


@dataclasses.dataclass(frozen=True)
class Run:
    """One run's directory, `root/name`.

    `lock` makes this process its only writer until `close` or the end of this object; None for
    readers.
    """

    path: Path
    lock: Lock | None = dataclasses.field(default=None, compare=False, repr=False)

    def close(self) -> None:
        """Releases the lock, so that others can write."""
        paths.forget(self.path)
        if self.lock is not None:
            self.lock.release()

    def file(self, name: str) -> Path:
        return self.path / name

    def log(self, **row: Any) -> None:
        """Appends a row to `metrics.jsonl`, stamped with the time in seconds since the epoch."""
        append_jsonl(self.file("metrics.jsonl"), {"time": round(time.time(), 3), **row})


def find_run(
    root: Path,
    name: str | None,
    config: Config,
    *,
    prefix: str,
    also: Mapping[str, Any] | None = None,
) -> Run:
    """Finds the folder of a run, free or holding the same run to be resumed. Writes nothing.

    Args:
      name: the folder's name under `root`. None: a folder `PREFIX-HASH` that holds this run, else a
        new one of that name.
      also: part of the identity beside the configuration's.

    Raises:
      UserError: the name is no plain folder name, or the folder holds a run of another identity
        (naming the first difference), so that two experiments never mix in one folder.
    """
    if not paths.is_address(root):
        paths.refuse_address(root, MOUNT)
    own = json.loads(json.dumps({**identity(config), **(also or {})}))
    if name is None:
        candidates = sorted(root.glob(f"{prefix}-{'[0-9a-f]' * 12}/config.json"))
        same = next(
            (file.parent.name for file in candidates if _stored_identity(file, config) == own), None
        )
        return Run(root / (same or f"{prefix}-{config_hash(own)}"))
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", name):
        raise UserError(
            f"--name='{name[:60]}' is not a plain folder name (up to 128 letters, digits, '.', '_', '-')"
        )
    run = Run(root / name)
    if run.file("config.json").exists():
        old = _stored_identity(run.file("config.json"), config)
        for key in sorted({*old, *own}):
            if old.get(key) != own.get(key):
                raise UserError(
                    f"{run.path} holds a run with {key}={old.get(key)!r}, not {own.get(key)!r}; pick another --name, or delete that folder"
                )
    return run


def _stored_identity(file: Path, config: Config) -> dict[str, Any]:
    """Reads a run's identity from `file`. A file of an older release lacks the fields that were
    added since, and has some that are no longer used."""
    stored = read_object(file)
    known = {leaf.flag for leaf in leaves(config)} | unused(config)
    beside = {key: value for key, value in stored.items() if key not in known}
    values = read_record(type(config), stored, file, ignore=beside)
    try:
        earlier = changed(type(config)(), **values)
    except UserError as error:  # a value out of its range
        raise UserError(f"{file}: {error}") from error
    return {**json.loads(json.dumps(identity(earlier))), **beside}


def open_run(
    root: Path,
    name: str | None,
    config: Config,
    *,
    prefix: str,
    also: Mapping[str, Any] | None = None,
) -> Run:
    """Calls `find_run`, and writes the folder and `config.json` of a new run. Raises `UserError`
    also if they cannot be written."""
    lock = hold(find_run(root, name, config, prefix=prefix, also=also).path)
    # once more: another may have made it meanwhile
    run = Run(find_run(root, name, config, prefix=prefix, also=also).path, lock)
    try:
        paths.make_folder(run.path)
        if not paths.is_address(run.path):
            for left in run.path.rglob(".*.tmp"):
                paths.delete(left)
        check_writable(run.path)
    except OSError as error:
        raise UserError(f"cannot write {run.path}: {error.strerror or error}") from error
    if not run.file("config.json").exists():
        write_json(run.file("config.json"), {**record(config), **(also or {})})
    return run


def check_writable(folder: Path, n_bytes: int = PROBE_BYTES) -> None:
    """Raises `UserError` early for a folder that cannot be written, or a disk with less than
    `n_bytes` free.

    Quotas and limits on file sizes are only noticed up to `PROBE_BYTES`, by writing that much.
    """
    free = math.inf if paths.is_address(folder) else shutil.disk_usage(folder).free
    if free < n_bytes:
        raise UserError(
            f"cannot write {folder}: {free / 1e6:,.0f} MB are free on that disk, {n_bytes / 1e6:,.0f} MB are needed"
        )
    probe = temporary_beside(folder / "probe")
    try:
        try:
            paths.write(probe, bytes(PROBE_BYTES))
        finally:
            paths.delete(probe)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error


def environment() -> dict[str, Any]:
    """Returns the environment of a result: versions, platform, git commit (None outside a
    checkout)."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    here = Path(__file__).parent
    git = ["git", "-C", str(here)]
    try:
        sha = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = bool(
            subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout
        )
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
