"""Folders that appear whole or not at all, with a manifest that notices a missing, truncated or changed file."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from kafjax.core.errors import UserError
from kafjax.core.lock import hold
from kafjax.core.rundir import check_writable, clear_temporaries, read_json, temporary_beside, write_json
from kafjax.core.schema import Count, checked, read

MANIFEST = "manifest.json"
T = TypeVar("T")
_READS = 100
_LOOKS = 5  # at a folder and the one before it, until both are known to be absent


@contextlib.contextmanager
def writing(directory: Path | str) -> Iterator[None]:
    """Keeps `directory` to this process, for work that ends in `replacing` it, and refuses at the start what that would refuse.

    Raises:
      UserError: another process writes it; its disk takes no files; or `directory` holds anything but a folder saved before:
        someone's files are not ours to delete.
    """
    with hold(directory):
        directory = Path(directory).resolve()
        _settle(directory)
        if directory.exists() and not is_replaceable(directory):
            raise UserError(f"{directory} exists and holds files that were not saved by kafjax; choose another folder")
        check_writable(directory.parent)
        yield


@contextlib.contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """Yields an empty sibling folder to fill; when the block ends without an error it takes the place of `directory`.

    A kill at any moment leaves the old folder or the new one, for `reading` and for the next writer. Raises `UserError` as `writing`.
    """
    with writing(directory):
        directory = Path(directory).resolve()
        clear_temporaries(directory)
        saving = temporary_beside(directory)
        try:
            saving.mkdir(parents=True)
            yield saving
            if directory.exists():
                directory.rename(_previous(directory))
            saving.rename(directory)
        except OSError as error:
            raise UserError(f"cannot write {directory}: {error.strerror or error}") from error
        finally:
            _settle(directory)
            shutil.rmtree(saving, ignore_errors=True)


def _settle(directory: Path) -> None:
    """Undoes or finishes a replacement that was cut off between its two renames. For the holder of the lock."""
    previous = _previous(directory)
    if previous.exists():
        if directory.exists():
            shutil.rmtree(previous, ignore_errors=True)
        else:
            previous.rename(directory)


def reading(directory: Path | str, read: Callable[[Path], T]) -> T:
    """Returns `read(folder)` of a folder that `replacing` has written, the old one or the new one as a whole. Writes nothing.

    Where a writer replaces the folder meanwhile it is read again: every save has a manifest of its own, so an unchanged manifest
    means that all files were of one save. Raises whatever `read` raises about a folder that stays as it is.
    """
    directory = Path(directory).resolve()
    for look in range(_READS):
        folder = _present(directory)
        before = _state(folder)
        try:
            result = read(folder)
        except Exception:
            # A folder without a manifest may be one that a writer is just deleting, so it is looked at more than once.
            has_manifest = before is not None and before[1] is not None
            if (has_manifest or look >= _LOOKS) and _state(_present(directory)) == before:
                raise
        else:
            if _state(_present(directory)) == before:
                return result
        time.sleep(min(look, 20) / 1000)
    raise UserError(f"{directory} was replaced {_READS} times while it was being read; try again when its writer is done")


def _present(directory: Path) -> Path:
    """The folder itself, or between the two renames of a writer the one before it."""
    for _ in range(_LOOKS):
        for folder in (directory, _previous(directory)):
            if folder.exists():
                return folder
    return directory


def _state(folder: Path) -> tuple[int, bytes | None] | None:
    """Tells one save from another: the folder's inode and its manifest, None where it has none; None for no folder."""
    try:
        number = folder.stat().st_ino
    except OSError:
        return None
    try:
        return number, (folder / MANIFEST).read_bytes()
    except OSError:
        return number, None


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256 of a file, as hexadecimal digits."""

    bytes: Count
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Contents of `manifest.json` of a saved index or store. `files` and `folders` are all that the folder holds."""

    kind: str
    format: Count
    files: dict[str, FileRecord]
    folders: list[str]
    count: Count | None = None
    dimension: Count | None = None
    engine: str = ""
    encoder: str = ""
    leaves: Count | None = None


def write_manifest(folder: Path, kind: str, **fields: Any) -> None:
    """Flushes the folder's files to disk and writes `manifest.json`: `kind`, `fields`, each file's size and sha256, an id of this save.

    Folders inside have a manifest of their own.
    """
    files = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            files[path.name] = {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    folders = sorted(path.name for path in folder.iterdir() if path.is_dir())
    about = {"kind": f"kafjax {kind}", "format": 1, "save": uuid.uuid4().hex, **fields}
    write_json(folder / MANIFEST, {**about, "files": files, "folders": folders})


def read_manifest(directory: Path, kind: str) -> Manifest:
    """The manifest of a folder saved as `kind`, its files checked against it.

    Raises `UserError` naming the folder or file that is missing, truncated, changed or of another kind.
    """
    path = directory / MANIFEST
    if not path.is_file():
        reason = "holds no manifest.json" if directory.is_dir() else "is not a folder"
        raise UserError(f"{directory} {reason}: not a saved {kind}; give the folder that save() wrote")
    again = f"build and save the {kind} again"
    stored = read_json(path)
    if not isinstance(stored, dict) or stored.get("kind") != f"kafjax {kind}":
        raise UserError(f"{path} is not the manifest of a saved {kind}")
    manifest = checked(Manifest, stored, path, fix=again)
    if manifest.format != 1:
        raise UserError(f"{path} has format {manifest.format}, this kafjax reads 1; {again}")
    for name, expected in manifest.files.items():
        _check_file(directory, name, expected, kind)
    return manifest


def _check_file(directory: Path, name: str, expected: FileRecord, kind: str) -> None:
    path = directory / name
    again = f"build and save the {kind} again"
    if Path(name).name != name or "\0" in name:
        raise UserError(f"{directory / MANIFEST} is damaged; {again}")
    if not path.is_file():
        raise UserError(f"{path} is missing; {again}")
    size = path.stat().st_size
    if size != expected.bytes:
        raise UserError(f"{path} has {size} bytes instead of {expected.bytes}; {again}")
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != expected.sha256:
            raise UserError(f"{path} is damaged (its checksum differs); {again}")


def size_on_disk(folder: Path) -> int:
    """Bytes of all files under `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _previous(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.previous")


def is_replaceable(directory: Path) -> bool:
    """True for an empty folder, or one that holds exactly the files of its manifest."""
    if not directory.is_dir():
        return False
    names = {path.name for path in directory.iterdir()}
    if MANIFEST not in names:
        return not names
    try:
        manifest = read(Manifest, directory / MANIFEST)
    except UserError:
        return False
    return manifest.kind.startswith("kafjax ") and names <= {MANIFEST, *manifest.files, *manifest.folders}
