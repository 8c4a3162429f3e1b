"""Checkpoints in a bucket that orbax does not write to: it writes a folder of this machine, from
which each is uploaded when whole."""

from __future__ import annotations

import tempfile
from pathlib import Path

from kafjax.core import paths

_LAST = "_CHECKPOINT_METADATA"
"""File of a checkpoint that is uploaded last and deleted first: one that has it is whole."""


class Staged:
    """A temporary folder that holds the whole checkpoints of `address`, for one process. Raises
    `OSError`, also from its methods.

    Attributes:
      folder: where orbax reads and writes.
    """

    def __init__(self, address: Path):
        self._address = address
        self._temporary = tempfile.TemporaryDirectory(prefix="kafjax-checkpoints-")
        self.folder = Path(self._temporary.name)
        names = paths.files_under(address)
        for name in sorted(names):
            step = _step_of(name)
            if f"{step}/{_LAST}" in names:
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                paths.download(address / name, self.folder / name)

    def publish(self) -> None:
        """Uploads the checkpoints that the bucket lacks, then deletes those that orbax has dropped.
        A kill leaves the older ones whole."""
        there = paths.files_under(self._address)
        here = {
            file.relative_to(self.folder).as_posix()
            for file in self.folder.rglob("*")
            if file.is_file()
        }
        whole = {_step_of(name) for name in here if name == f"{_step_of(name)}/{_LAST}"}
        wanted = {name for name in here if _step_of(name) in whole}
        for name in sorted(wanted - there, key=_order):
            paths.upload(self.folder / name, self._address / name)
        dropped = {name for name in there - wanted if _step_of(name).isdecimal()}
        for name in sorted(dropped, key=_order, reverse=True):
            paths.delete(self._address / name)

    def close(self) -> None:
        """Deletes the folder of this machine."""
        self._temporary.cleanup()


def _step_of(name: str) -> str:
    return name.partition("/")[0]


def _order(name: str) -> bool:
    return name.endswith(f"/{_LAST}")
