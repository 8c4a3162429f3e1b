"""Folders that appear whole or not at all, with a manifest that notices a missing, truncated or changed file."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kafjax.core.errors import UserError
from kafjax.core.rundir import read_json, write_json

MANIFEST = "manifest.json"


@contextlib.contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """Yields an empty sibling folder to fill; when the block ends without an error it takes the place of `directory`.

    A kill at any moment leaves the old folder or the new one (`settled` finishes what was cut off between the two renames).
    One writer at a time. Raises `UserError` if the disk refuses, or if `directory` holds anything but a folder saved
    before: someone's files are not ours to delete.
    """
    directory = settled(directory)
    if directory.exists() and not is_replaceable(directory):
        raise UserError(f"{directory} exists and holds files that were not saved by kafjax; choose another folder")
    saving, previous = _beside(directory, "saving"), _beside(directory, "previous")
    try:
        shutil.rmtree(saving, ignore_errors=True)
        saving.mkdir(parents=True)
        yield saving
        if directory.exists():
            directory.rename(previous)
        saving.rename(directory)
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error.strerror or error}") from error
    finally:
        settled(directory)
        shutil.rmtree(saving, ignore_errors=True)


def settled(directory: Path) -> Path:
    """The absolute path of `directory`, after undoing or finishing a replacement that was cut off."""
    directory = Path(directory).resolve()
    previous = _beside(directory, "previous")
    if previous.exists():
        if directory.exists():
            shutil.rmtree(previous, ignore_errors=True)
        else:
            previous.rename(directory)
    return directory


def write_manifest(folder: Path, kind: str, **fields: Any) -> None:
    """Flushes the folder's files to disk and writes `manifest.json`: `kind`, `fields`, and each file's size and sha256.

    Folders inside have a manifest of their own.
    """
    files = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            files[path.name] = {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    folders = sorted(path.name for path in folder.iterdir() if path.is_dir())
    write_json(folder / MANIFEST, {"kind": f"kafjax {kind}", "format": 1, **fields, "files": files, "folders": folders})


def read_manifest(directory: Path, kind: str) -> dict[str, Any]:
    """The manifest of a folder saved as `kind`, its files checked against it.

    Raises `UserError` naming the folder or file that is missing, truncated, changed or of another kind.
    """
    path = directory / MANIFEST
    if not path.is_file():
        reason = "holds no manifest.json" if directory.is_dir() else "is not a folder"
        raise UserError(f"{directory} {reason}: not a saved {kind}; give the folder that save() wrote")
    try:
        manifest = read_json(path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged; build and save the {kind} again") from error
    if not isinstance(manifest, dict) or manifest.get("kind") != f"kafjax {kind}" or not isinstance(manifest.get("files"), dict):
        raise UserError(f"{path} is not the manifest of a saved {kind}")
    if manifest.get("format") != 1:
        raise UserError(f"{path} has format {manifest.get('format')!r}, this kafjax reads 1; build and save the {kind} again")
    for name, expected in manifest["files"].items():
        _check_file(directory, name, expected, kind)
    return manifest


def _check_file(directory: Path, name: str, expected: Any, kind: str) -> None:
    path = directory / name
    again = f"build and save the {kind} again"
    if Path(name).name != name or not isinstance(expected, dict):
        raise UserError(f"{directory / MANIFEST} is damaged; {again}")
    if not path.is_file():
        raise UserError(f"{path} is missing; {again}")
    size = path.stat().st_size
    if size != expected.get("bytes"):
        raise UserError(f"{path} has {size} bytes instead of {expected.get('bytes')}; {again}")
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != expected.get("sha256"):
            raise UserError(f"{path} is damaged (its checksum differs); {again}")


def size_on_disk(folder: Path) -> int:
    """Bytes of all files under `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _beside(directory: Path, suffix: str) -> Path:
    return directory.with_name(f".{directory.name}.{suffix}")


def is_replaceable(directory: Path) -> bool:
    """Whether it is an empty folder, or one that holds what a manifest of ours lists and nothing else."""
    if not directory.is_dir():
        return False
    names = {path.name for path in directory.iterdir()}
    if MANIFEST not in names:
        return not names
    try:
        manifest = read_json(directory / MANIFEST)
        ours = manifest["kind"].startswith("kafjax ")
        return ours and names <= {MANIFEST, *manifest["files"], *manifest["folders"]}
    except (UserError, UnicodeDecodeError, LookupError, TypeError, AttributeError):
        return False
