"""Segments: what a saved index or store is made of, so that a change costs what is changed.

    FOLDER/manifest.json           names the segments that count, in order; written last
    FOLDER/segment-0123456789ab/   ids.json, deleted.npy, and the vectors and texts of these ids

The first segment is the base. Each later one holds the rows that one save added, and in
`deleted.npy` the rows of earlier segments that it took away: row numbers run on through all
segments. No file of a segment ever changes. A save writes a new segment, or a new base in place of
all once a quarter of the rows lies beside it; then the manifest, then it deletes what the manifest
no longer names.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kafjax.core.errors import UserError
from kafjax.core.rundir import read_json, write_atomic
from kafjax.retrieval import folder
from kafjax.retrieval.folder import Manifest, SegmentRecord

# rows added and deleted since the base, as a share of it, that are merged into a new one
MERGE_SHARE = 0.25
MOST_SEGMENTS = 64  # bounds the files to open after many small saves
_IDS, _DELETED = "ids.json", "deleted.npy"


@dataclasses.dataclass(frozen=True)
class Log:
    """The saved state that a change is a change of."""

    directory: Path
    save: str
    segments: tuple[SegmentRecord, ...]


class Rows:
    """Unique live ids in order, each with its row number on disk, and what has changed since the
    last save."""

    def __init__(
        self,
        ids: Sequence[str] = (),
        numbers: range | np.ndarray | None = None,
        n_saved: int = 0,
        log: Log | None = None,
    ):
        """`numbers` are the ids' rows among the `n_saved` on disk; None: nothing is on disk yet."""
        self.ids = list(ids)
        self._given = range(len(self.ids)) if numbers is None else numbers
        self._number: dict[str, int] | None = None
        self._hashes: tuple[np.ndarray, np.ndarray] | None = None
        self.n_saved, self.log = n_saved, log
        self.n_new = len(self.ids) if numbers is None else 0
        self._next = max(n_saved, len(self.ids))
        self.gone: list[int] = []

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def number(self) -> dict[str, int]:
        """Row number of each id. Made when first asked for, which is the first change."""
        if self._number is None:
            self._number = dict(
                zip(
                    self.ids,
                    self._given if isinstance(self._given, range) else self._given.tolist(),
                    strict=True,
                )
            )
        return self._number

    def numbers_of(self, ids: Sequence[str]) -> list[int]:
        """Row numbers of ids, without a dictionary of all of them: hashes are sorted in a quarter
        of its time, and take a fifth of its memory. Raises `KeyError` for an unknown id."""
        if self._number is not None:
            return [self._number[id] for id in ids]
        if self._hashes is None:
            hashes = np.fromiter(map(hash, self.ids), np.int64, len(self.ids))
            places = np.argsort(hashes)
            self._hashes = hashes[places], places
        hashes, places = self._hashes
        wanted = np.fromiter(map(hash, ids), np.int64, len(ids))
        firsts, ends = (hashes.searchsorted(wanted, side).tolist() for side in ("left", "right"))
        numbers = []
        for id, first, end in zip(ids, firsts, ends, strict=True):
            place = next((at for at in places[first:end].tolist() if self.ids[at] == id), None)
            if place is None:
                raise KeyError(id)
            numbers.append(int(self._given[place]))
        return numbers

    @property
    def new_ids(self) -> list[str]:
        """Live ids that are not on disk: the last ones."""
        return self.ids[len(self.ids) - self.n_new :]

    def append(self, ids: Sequence[str]) -> None:
        self.number.update(zip(ids, range(self._next, self._next + len(ids)), strict=True))
        self._next += len(ids)
        self.ids += ids
        self.n_new += len(ids)

    def delete(self, ids: Sequence[str]) -> np.ndarray:
        """Returns the positions in `self.ids` before the call that stay, ascending."""
        lost = set(ids)
        kept = np.fromiter((place for place, id in enumerate(self.ids) if id not in lost), np.int32)
        numbers = [self.number.pop(id) for id in ids]
        self.gone += [number for number in numbers if number < self.n_saved]
        self.n_new -= sum(number >= self.n_saved for number in numbers)
        self.ids = [self.ids[place] for place in kept]
        return kept

    def settle(self, ids: Sequence[str], log: Log) -> None:
        """Notes that all is on disk; `ids` are those of the newest segment, in its order."""
        if len(log.segments) == 1:
            self.__init__(ids, range(len(ids)), len(ids), log)
            return
        self.number.update(zip(ids, range(self.n_saved, self.n_saved + len(ids)), strict=True))
        self.n_saved += len(ids)
        self._next, self.n_new, self.gone, self.log = self.n_saved, 0, [], log


def save(
    directory: Path | str,
    kind: str,
    rows: Rows,
    write_all: Callable[[Path], tuple[list[str], dict[str, Any]]],
    write_new: Callable[[Path, list[str]], None],
    **fields: Any,
) -> list[str]:
    """Writes what has changed since `rows.log` beside it, or everything, and settles `rows`.
    Returns the ids of the new segment.

    Args:
      write_all: writes a base into an empty folder, and returns its ids in their order there, and
        fields of the manifest.
      write_new: writes some ids, all of them new, into an empty folder.
      fields: of the manifest.

    Raises:
      UserError: the disk refuses, the folder holds something else, or another process has changed
        it since.
    """
    directory, log = Path(directory).resolve(), rows.log
    with folder.committing(directory) as path:
        earlier: tuple[SegmentRecord, ...] = ()
        if log is not None and log.directory == directory and path == directory:
            manifest = folder.read_manifest(directory, kind)
            if manifest.save != log.save:
                raise UserError(
                    f"{directory} was changed by another process after it was read; read it again, and repeat the change"
                )
            # An index may be served by another engine than it was saved by.
            other_engine = manifest.engine != fields.get("engine", "")
            earlier = () if other_engine or _should_merge(rows, log) else log.segments
            fields = {**fields, "leaves": manifest.leaves}
            if earlier and not rows.n_new and not rows.gone:
                return []
        segment = path / f"segment-{uuid.uuid4().hex[:12]}"
        segment.mkdir()
        if earlier:
            ids = rows.new_ids
            write_new(segment, ids)
        else:
            ids, more = write_all(segment)
            fields = {**fields, **more}
        gone = sorted(rows.gone) if earlier else []
        np.save(segment / _DELETED, np.array(gone, np.int64), allow_pickle=False)
        write_atomic(segment / _IDS, json.dumps(ids))
        segments = (*earlier, SegmentRecord(segment.name, len(ids), folder.sealed(segment)))
        saved = folder.write_manifest(
            path,
            kind,
            count=len(rows),
            segments=[dataclasses.asdict(one) for one in segments],
            **fields,
        )
    rows.settle(ids, Log(directory, saved, segments))
    return ids


def _should_merge(rows: Rows, log: Log) -> bool:
    dead = rows.n_saved - (len(rows) - rows.n_new)
    beside = sum(segment.count for segment in log.segments[1:]) + rows.n_new + dead
    return len(log.segments) >= MOST_SEGMENTS or beside > MERGE_SHARE * log.segments[0].count


def read(directory: Path, manifest: Manifest) -> tuple[Rows, list[np.ndarray]]:
    """Returns the rows of a saved folder, and the positions in each of its segments that live,
    ascending.

    Raises `UserError` for segments that contradict each other or the manifest.
    """
    ids: list[str] = []
    live_N = np.ones(sum(segment.count for segment in manifest.segments), bool)
    ends = []
    for segment in manifest.segments:
        path = directory / segment.name
        deleted = _read_deleted(path / _DELETED)
        if len(deleted) and not (
            0 <= deleted[0]
            and deleted[-1] < len(ids)
            and live_N[deleted].all()
            and (np.diff(deleted) > 0).all()
        ):
            raise UserError(f"{path / _DELETED} deletes rows that are not there; {folder.AGAIN}")
        live_N[deleted] = False
        found = read_ids(path / _IDS)
        if len(found) != segment.count:
            raise UserError(f"{path} has {len(found)} ids for {segment.count} rows; {folder.AGAIN}")
        ids += found
        ends.append(len(ids))
    numbers = np.flatnonzero(live_N)
    living = ids if len(numbers) == len(ids) else [ids[number] for number in numbers]
    # The ids of one file are unique: `read_ids` saw to that.
    n_different = len(living) if len(manifest.segments) == 1 else len(set(living))
    if not n_different == len(living) == manifest.count:
        raise UserError(
            f"{directory} has {n_different} different ids for {manifest.count} rows; {folder.AGAIN}"
        )
    rows = Rows(
        living, numbers, len(ids), Log(directory.resolve(), manifest.save, tuple(manifest.segments))
    )
    live = [
        np.flatnonzero(live_N[end - segment.count : end])
        for segment, end in zip(manifest.segments, ends, strict=True)
    ]
    return rows, live


def read_ids(path: Path) -> list[str]:
    """Reads a list of unique ids. Raises `UserError` for anything else."""
    if not path.is_file():
        raise UserError(f"{path} is missing; {folder.AGAIN}")
    # Not through a schema, which would hold a million strings three times over: `checked_ids` is as
    # strict.
    found = read_json(path)
    if not isinstance(found, list):
        raise UserError(f"{path} holds no list of ids; {folder.AGAIN}")
    try:
        return checked_ids(found)
    except UserError as error:
        raise UserError(f"{path}: {error}; {folder.AGAIN}") from error


def _read_deleted(path: Path) -> np.ndarray:
    try:
        deleted = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is missing or no array of rows; {folder.AGAIN}") from error
    if deleted.ndim != 1 or deleted.dtype != np.int64:
        raise UserError(f"{path} holds {deleted.dtype} {deleted.shape}, not rows; {folder.AGAIN}")
    return deleted


def checked_ids(ids: Sequence[str]) -> list[str]:
    """Returns the ids as a list. Raises `UserError` for one that is no string, or is given
    twice."""
    if isinstance(ids, str):
        raise UserError(f"ids must be a list of strings, got the one string '{ids}'")
    ids = list(ids)
    if not {*map(type, ids)} <= {str}:  # a million take no time
        for id in ids:
            if not isinstance(id, str):
                raise UserError(f"ids must be strings, got {id!r}")
    if len(set(ids)) < len(ids):
        twice = collections.Counter(ids).most_common(1)[0][0]
        raise UserError(f"id '{twice}' is given twice; ids must be unique")
    return ids
