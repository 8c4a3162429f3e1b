"""The texts of passages, read from disk one by one: a store of a million opens without reading
them."""

from __future__ import annotations

import bisect
import dataclasses
import json
import mmap
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from kafjax.core.errors import UserError
from kafjax.core.records import Passage
from kafjax.core.schema import parsed
from kafjax.retrieval.base import read_npy
from kafjax.retrieval.folder import AGAIN

PASSAGES = "passages.jsonl"
# int64 [N + 1, 2]: where each line begins, and its CRC-32; at last the size of the file
_PLACES = "places.npy"


class Texts:
    """Passages by id: those on disk by their row number, the others in memory."""

    def __init__(self) -> None:
        self._files: list[_File] = []
        self._starts: list[int] = []  # number of each file's first row
        self._new: dict[str, Passage] = {}

    def add(self, passages: Iterable[Passage]) -> None:
        """Takes passages that are not on disk."""
        self._new.update((passage.id, passage) for passage in passages)

    def drop(self, ids: Iterable[str]) -> None:
        for id in ids:
            self._new.pop(id, None)

    def open(self, paths: Sequence[Path], counts: Sequence[int]) -> None:
        """Takes files that `write` wrote, behind the others. Raises `UserError` for any other."""
        for path, count in zip(paths, counts, strict=True):
            self._starts.append(self._starts[-1] + self._files[-1].count if self._files else 0)
            self._files.append(_File(path, count))

    def passage(self, id: str, number: int) -> Passage:
        """The passage of an id and its row number. Raises `UserError` naming a damaged line."""
        if id in self._new:
            return self._new[id]
        line, where = self._read(number)
        passage = parsed(Passage, line, where, fix=AGAIN)
        if passage.id != id:
            raise UserError(f"{where}: it has the id '{passage.id}', not '{id}'; {AGAIN}")
        return passage

    def line(self, id: str, number: int) -> bytes:
        """A passage as its line in a file: the same bytes where it is on disk. Raises `UserError`
        naming a damaged line."""
        if id not in self._new:
            return self._read(number)[0]
        # Escaped to ASCII: some readers take U+2028 and the like in a text for the end of a line.
        return json.dumps(dataclasses.asdict(self._new[id])).encode() + b"\n"

    def _read(self, number: int) -> tuple[bytes, str]:
        """A line on disk, and where it is, for messages."""
        which = bisect.bisect_right(self._starts, number) - 1
        file, row = self._files[which], number - self._starts[which]
        where = f"{file.path}: row {row + 1}"
        try:
            return file.line(row), where
        except ValueError as error:
            raise UserError(f"{where}: it is damaged; {AGAIN}") from error


def write(path: Path, lines: Iterable[bytes]) -> None:
    """Writes lines, and where each of them is, into a folder. They are in memory one at a time."""
    places, start = [], 0
    with open(path / PASSAGES, "wb") as file:
        for line in lines:
            file.write(line)
            places.append((start, zlib.crc32(line)))
            start += len(line)
    np.save(path / _PLACES, np.array([*places, (start, 0)], np.int64), allow_pickle=False)


class _File:
    def __init__(self, path: Path, count: int):
        self.path, self.count = path / PASSAGES, count
        # Of the mapped array: NumPy's memmap takes a microsecond to give a row.
        self._places = np.asarray(read_npy(path / _PLACES, (count + 1, 2), np.int64))
        try:
            with open(self.path, "rb") as file:
                size = file.seek(0, 2)
                self._data: mmap.mmap | bytes = (
                    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
                )
        except OSError as error:
            raise UserError(f"{self.path} is missing; {AGAIN}") from error
        if self._places[-1, 0] != size:
            raise UserError(
                f"{self.path} has {size} bytes instead of {self._places[-1, 0]}; {AGAIN}"
            )

    def line(self, row: int) -> bytes:
        """Raises `ValueError` for a line whose sum differs."""
        (start, check), (end, _) = self._places[row : row + 2].tolist()
        line = self._data[start:end]
        if zlib.crc32(line) != check:
            raise ValueError
        return line
