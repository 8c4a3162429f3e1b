"""The lists of a training's history, in one file that only grows: a checkpoint notes the length of
its prefix, not the contents."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

from kafjax.core import paths
from kafjax.parallel.distributed import is_main

_NOTHING = {"bytes": 0, "crc": 0, "counts": {}}


class Journal:
    """JSON lines `[name of the list, item]` in `path`. Lists may only be appended to.

    Each checkpoint refers to a prefix of the file by its length and checksum. Going on from an
    earlier checkpoint cuts off what lies behind its prefix. Process 0 writes; all processes read.
    """

    def __init__(self, path: Path):
        self._path = path
        self._end: dict[str, Any] = _NOTHING
        self._held = b""  # of an object of a bucket, which is written anew with each save

    def append(self, history: dict[str, Any]) -> dict[str, Any]:
        """Writes the items that are new since the last call (or `read`) and returns the note for a
        checkpoint.

        The cost is that of the new items, however long the lists are. Raises `OSError` if the disk
        refuses.
        """
        lists = {name: value for name, value in history.items() if isinstance(value, list)}
        rest = {name: value for name, value in history.items() if name not in lists}
        counts = self._end["counts"]
        new = [
            [name, item] for name, items in lists.items() for item in items[counts.get(name, 0) :]
        ]
        data = "".join(json.dumps(line) + "\n" for line in new).encode()
        start = self._end["bytes"]
        if is_main() and paths.is_address(self._path):
            self._held = self._held[:start] + data
            paths.write(self._path, self._held)
        elif is_main():
            with open(self._path, "r+b" if start else "wb") as file:
                file.truncate(start)
                file.seek(start)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        end = {"bytes": start + len(data), "crc": zlib.crc32(data, self._end["crc"])}
        self._end = {**end, "counts": {name: len(items) for name, items in lists.items()}}
        return {"rest": rest, "journal": self._end}

    def read(self, noted: dict[str, Any]) -> dict[str, Any]:
        """Reads the history of the checkpoint that noted `noted`. `append` then continues behind
        it.

        Raises:
          ValueError, OSError: the file is missing or damaged before the end of the prefix.
        """
        end = noted["journal"]
        data = b""
        if end["bytes"]:
            if paths.is_address(self._path):
                data = self._held = paths.read(self._path)[: end["bytes"]]
            else:
                with open(self._path, "rb") as file:
                    data = file.read(end["bytes"])
        if (len(data), zlib.crc32(data)) != (end["bytes"], end["crc"]):
            raise ValueError(f"{self._path.name} does not hold what it refers to")
        history = {**noted["rest"], **{name: [] for name in end["counts"]}}
        for line in data.splitlines():
            name, item = json.loads(line)
            history[name].append(item)
        self._end = end
        return history
