"""Stores in buckets: read and changed as a copy on this machine, since their files are mapped into
memory.

The copy lies in the cache (`$KAFJAX_CACHE`), and only what it lacks is downloaded. A change is
uploaded: first files of new names, then the manifest, on the condition that the bucket still holds
the one that was read, then what it no longer names is deleted. A kill at any moment leaves the save
before it, whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from kafjax import hub
from kafjax.core import paths
from kafjax.core.errors import UserError
from kafjax.core.lock import hold
from kafjax.core.paths import as_path, is_address, temporary_beside
from kafjax.core.rundir import read_bytes, read_json, write_json
from kafjax.retrieval import folder
from kafjax.retrieval.folder import MANIFEST, FileRecord, Manifest

_COPY_SECONDS = 3600.0  # that one process waits for another's download
_MOST_BYTES = 200_000_000  # of a manifest
_READS = 10


def fetched(directory: Path | str) -> Path:
    """Returns a folder of this machine: `directory`, or a copy of what its bucket holds now.

    Raises:
      UserError: there is no store, it is damaged or of an earlier release, the bucket or the disk
        refuses.
    """
    if not is_address(directory):
        return Path(directory)
    address = as_path(directory)
    copy = copy_of(address)
    if _saved(copy) != _manifest(address)[1].save:
        with hold(copy, wait_seconds=_COPY_SECONDS):
            _fetch(address, copy)
    return copy


@contextlib.contextmanager
def changing(directory: Path | str) -> Generator[Path]:
    """Yields a folder of this machine to save to: `directory`, or a copy that is uploaded when the
    block ends without an error.

    Raises:
      UserError: as `folder.writing` and `fetched`, or another process was faster.
    """
    if not is_address(directory):
        yield Path(directory)
        return
    address = as_path(directory)
    copy = copy_of(address)
    with folder.writing(address), hold(copy, wait_seconds=_COPY_SECONDS):
        before = paths.version(address / MANIFEST)
        if before is None:
            paths.delete(copy)  # of a store that is not there any more
        else:
            _fetch(address, copy)
        yield copy
        try:
            _upload(copy, address, before)
        except OSError as error:
            raise UserError(f"cannot write {address}: {error.strerror or error}") from error


def copy_of(address: Path) -> Path:
    """Returns the folder of this machine that mirrors `address`."""
    digest = hashlib.blake2b(str(address).encode(), digest_size=6).hexdigest()
    return hub.cache_dir() / "indexes" / f"{address.name}-{digest}"


def _fetch(address: Path, copy: Path) -> None:
    """Brings the copy up to the bucket. The caller holds its lock."""
    for _ in range(_READS):
        stored, manifest = _manifest(address)
        if _saved(copy) == manifest.save:
            return
        try:
            for name, record in _files(manifest):
                _download(address / name, copy / name, record)
        except FileNotFoundError:  # a writer has deleted it, and written another manifest
            continue
        except OSError as error:
            raise UserError(f"cannot copy {address} to {copy}: {error}") from error
        write_json(copy / MANIFEST, stored)
        folder.sweep(copy, set())
        return
    raise UserError(f"{address} lacks files that its manifest names; {folder.AGAIN}")


def _download(source: Path, target: Path, expected: FileRecord) -> None:
    """Copies a file that is not there yet. Files of a name never change."""
    if target.is_file() and target.stat().st_size == expected.bytes:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    made = temporary_beside(target)
    try:
        paths.download(source, made)
        os.replace(made, target)
    finally:
        made.unlink(missing_ok=True)


def _upload(copy: Path, address: Path, before: str | None) -> None:
    held = paths.files_under(address)
    manifest = folder.read_manifest(copy, "store")
    wanted = [name for name, _ in _files(manifest)]
    for name in wanted:
        if name not in held:
            paths.upload(copy / name, address / name)
    if not paths.swap(address / MANIFEST, before, read_bytes(copy / MANIFEST, _MOST_BYTES)):
        raise UserError(
            f"{address} was changed by another process after it was read; read it again, and repeat the change"
        )
    for name in held - {MANIFEST, *wanted}:
        if folder.LEFT.fullmatch(name.partition("/")[0]):
            paths.delete(address / name)


def _manifest(address: Path) -> tuple[Any, Manifest]:
    """Reads the manifest of a store in a bucket, as it stands and checked."""
    path = address / MANIFEST
    if not paths.exists(path):
        raise UserError(f"{address} holds no {MANIFEST}: it is not a saved store")
    stored = read_json(path)
    manifest = folder.checked_manifest(stored, path, "store")
    if manifest.format != folder.FORMAT:
        raise UserError(f"{address} is of an earlier release; {folder.AGAIN}")
    return stored, manifest


def _files(manifest: Manifest) -> Iterator[tuple[str, FileRecord]]:
    for segment in manifest.segments:
        for name, record in segment.files.items():
            yield f"{segment.name}/{name}", record


def _saved(copy: Path) -> str | None:
    """Returns the id of the save that the copy is of; None if there is none, or files are
    missing."""
    try:
        manifest = folder.read_manifest(copy, "store")
        whole = all((copy / name).stat().st_size == one.bytes for name, one in _files(manifest))
    except (UserError, OSError):
        return None
    return manifest.save if whole else None
