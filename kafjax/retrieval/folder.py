"""Folders that change as a whole or not at all, with a manifest that notices a missing, truncated
or changed file."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import os
import re
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import IO, Any, TypeVar

from kafjax.core.errors import UserError
from kafjax.core.lock import hold
from kafjax.core.paths import as_path, is_address
from kafjax.core.rundir import (
    check_writable,
    clear_temporaries,
    read_json,
    temporary_beside,
    write_json,
)
from kafjax.core.schema import Count, Share, checked, read
from kafjax.retrieval.tuning import Setting

MANIFEST = "manifest.json"
FORMAT = 2
AGAIN = "build it again, with experiments.build_index --corpus"
T = TypeVar("T")
_READS = 100
_BLOCK = 1 << 20  # bytes summed at a time: fits a processor's cache
LEFT = re.compile(r"segment-[0-9a-f]{12}|\.manifest\.json\.[0-9a-f]{32}\.tmp")
"""Names of what a killed writer leaves in a folder."""


@contextlib.contextmanager
def writing(directory: Path | str) -> Generator[None]:
    """Keeps `directory` to this process, for work that ends in a change of it, and refuses at the
    start what that would refuse.

    Raises:
      UserError: another process writes it; its disk takes no files; or `directory` holds anything
        but a folder saved before: someone's files are not ours to delete.
    """
    with hold(directory):
        directory = as_path(directory) if is_address(directory) else Path(directory).resolve()
        if directory.exists() and not is_replaceable(directory):
            raise UserError(
                f"{directory} exists and holds files that were not saved by kafjax; choose another folder"
            )
        check_writable(directory.parent)
        yield


@contextlib.contextmanager
def committing(directory: Path) -> Generator[Path]:
    """Yields the folder for files of new names, and at last for `write_manifest`, which makes them
    count.

    A folder that is not there yet is made under another name, and gets its own when the block ends
    without an error. At the end what the manifest does not name is deleted. A kill at any moment
    leaves the old manifest with its files, or the new one with its files. Raises `UserError` as
    `writing`.
    """
    with writing(directory):
        directory = Path(directory).resolve()
        clear_temporaries(directory)
        try:
            if (directory / MANIFEST).exists():
                ours = {path.name for path in directory.iterdir()}
                try:
                    yield directory
                finally:
                    sweep(directory, ours)
                return
            made = temporary_beside(directory)
            made.mkdir(parents=True)
            try:
                yield made
                made.rename(directory)
            finally:
                shutil.rmtree(made, ignore_errors=True)
        except OSError as error:
            raise UserError(f"cannot write {directory}: {error.strerror or error}") from error


def sweep(directory: Path, ours: set[str]) -> None:
    """Deletes what the manifest does not name: files of the names `ours`, and what killed writers
    left. Readers may have them open."""
    manifest = read(Manifest, directory / MANIFEST)
    for path in directory.iterdir():
        if path.name not in _named(manifest) and (path.name in ours or LEFT.fullmatch(path.name)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def reading(directory: Path | str, read: Callable[[Path], T]) -> T:
    """Returns `read(folder)`, which reads the manifest first. Writes nothing.

    The files that a manifest names never change, so what is read is one save. Only that a writer
    deleted them meanwhile is possible: it has then written another manifest, and the folder is read
    again. Raises whatever `read` raises about a folder that stays as it is.
    """
    directory = Path(directory).resolve()
    for look in range(_READS):
        before = _state(directory)
        try:
            return read(directory)
        except Exception:
            if _state(directory) == before:
                raise
        time.sleep(min(look, 20) / 1000)
    raise UserError(
        f"{directory} was replaced {_READS} times while it was being read; try again when its writer is done"
    )


def _state(directory: Path) -> bytes | None:
    """Tells one save from another: every manifest has an id of its own."""
    try:
        return (directory / MANIFEST).read_bytes()
    except OSError:
        return None


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """Size and CRC-32 of a file. Saves of earlier releases noted its SHA-256 instead, as
    hexadecimal digits.

    Sums notice damage, not forgery: whoever can write the file can write the manifest. A CRC-32 is
    read three times as fast.
    """

    bytes: Count
    crc32: Count | None = None
    sha256: str | None = None


@dataclasses.dataclass(frozen=True)
class SegmentRecord:
    """A folder of the files of `count` rows."""

    name: str
    count: Count
    files: dict[str, FileRecord]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Contents of `manifest.json` of a saved index or store. `count` rows live. `files` and
    `folders` are those of format 1."""

    kind: str
    format: Count
    save: str = ""
    segments: tuple[SegmentRecord, ...] = ()
    count: Count | None = None
    dimension: Count | None = None
    engine: str = ""
    encoder: str = ""
    leaves: Count | None = None
    recall: Share | None = None
    tuned: tuple[Setting, ...] = ()
    files: dict[str, FileRecord] = dataclasses.field(default_factory=dict)
    folders: tuple[str, ...] = ()


def _named(manifest: Manifest) -> set[str]:
    return {
        MANIFEST,
        *manifest.files,
        *manifest.folders,
        *(segment.name for segment in manifest.segments),
    }


def sealed(folder: Path) -> dict[str, FileRecord]:
    """Flushes the folder's files to disk. Returns the record of each by its name."""
    files = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            files[path.name] = FileRecord(path.stat().st_size, _crc32(file))
    return files


def write_manifest(folder: Path, kind: str, **fields: Any) -> str:
    """Writes `manifest.json`: `kind`, `fields`, and an id of this save, which is returned."""
    save = uuid.uuid4().hex
    write_json(
        folder / MANIFEST, {"kind": f"kafjax {kind}", "format": FORMAT, "save": save, **fields}
    )
    return save


def read_manifest(directory: Path, kind: str) -> Manifest:
    """The manifest of a folder saved as `kind`. Its files are not looked at: see `checking`.

    Raises `UserError` naming a folder or file that is missing, damaged, of another kind or of a
    later format.
    """
    path = directory / MANIFEST
    if not path.is_file():
        reason = "holds no manifest.json" if directory.is_dir() else "is not a folder"
        raise UserError(
            f"{directory} {reason}: not a saved {kind}; give the folder that save() wrote"
        )
    return checked_manifest(read_json(path), path, kind)


def checked_manifest(stored: Any, path: Path, kind: str) -> Manifest:
    """Checks what was read from the manifest at `path`. Raises `UserError` as `read_manifest`
    does."""
    if not isinstance(stored, dict) or stored.get("kind") != f"kafjax {kind}":
        raise UserError(f"{path} is not the manifest of a saved {kind}")
    manifest = checked(Manifest, stored, path, fix=AGAIN)
    if manifest.format not in (1, FORMAT):
        raise UserError(
            f"{path} has format {manifest.format}, this kafjax reads 1 and {FORMAT}; {AGAIN}"
        )
    if manifest.format == FORMAT and not manifest.segments:
        raise UserError(f"{path} names no segments; {AGAIN}")
    for segment in manifest.segments:
        plain = all(Path(name).name == name and "\0" not in name for name in segment.files)
        if not plain or not LEFT.fullmatch(segment.name):
            raise UserError(f"{path} is damaged; {AGAIN}")
    return manifest


@contextlib.contextmanager
def checking(
    directory: Path, manifest: Manifest, by_size: frozenset[str] = frozenset()
) -> Generator[Callable[[], None]]:
    """Checks the files that a manifest names in threads, beside the block; yields what waits for
    the outcome, as its end does.

    Args:
      by_size: names of files whose sums are left out: what reads them checks each row.

    Raises:
      UserError: naming a file that is missing, truncated or changed.
    """
    groups = [
        (directory, manifest.files),
        *((directory / segment.name, segment.files) for segment in manifest.segments),
    ]
    files = [(place, name, record) for place, records in groups for name, record in records.items()]
    for file in files:
        _check_size(*file)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        checks = [pool.submit(_check_file, *file) for file in files if file[1] not in by_size]

        def wait() -> None:
            for check in checks:
                check.result()

        try:
            yield wait
        except UserError:
            wait()  # a sum that differs is the better reason
            raise
        wait()


def _check_size(directory: Path, name: str, expected: FileRecord) -> None:
    path = directory / name
    if Path(name).name != name or "\0" in name:
        raise UserError(f"{directory / MANIFEST} is damaged; {AGAIN}")
    if not path.is_file():
        raise UserError(f"{path} is missing; {AGAIN}")
    size = path.stat().st_size
    if size != expected.bytes:
        raise UserError(f"{path} has {size} bytes instead of {expected.bytes}; {AGAIN}")


def _check_file(directory: Path, name: str, expected: FileRecord) -> None:
    path = directory / name
    try:
        with open(path, "rb") as file:
            if expected.sha256 is None:
                is_sound = _crc32(file) == expected.crc32
            else:
                is_sound = hashlib.file_digest(file, "sha256").hexdigest() == expected.sha256
    except OSError as error:  # a writer may have deleted it just now
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if not is_sound:
        raise UserError(f"{path} is damaged (its checksum differs); {AGAIN}")


def _crc32(file: IO[bytes]) -> int:
    check = 0
    while block := file.read(_BLOCK):
        check = zlib.crc32(block, check)
    return check


def size_on_disk(folder: Path) -> int:
    """Bytes of all files under `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def is_replaceable(directory: Path) -> bool:
    """True for a folder that holds no more than what its manifest names and killed writers
    left."""
    if not directory.is_dir():
        return False
    names = {path.name for path in directory.iterdir()}
    if MANIFEST not in names:
        return all(LEFT.fullmatch(name) for name in names)
    try:
        manifest = read(Manifest, directory / MANIFEST)
    except UserError:
        return False
    return manifest.kind.startswith("kafjax ") and all(
        name in _named(manifest) or LEFT.fullmatch(name) for name in names
    )
