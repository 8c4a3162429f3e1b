"""An index together with the passages it finds: the whole of what retrieval must keep."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from kafjax.core.errors import UserError
from kafjax.core.records import Passage
from kafjax.core.rundir import write_atomic
from kafjax.core.schema import read_rows
from kafjax.retrieval import folder
from kafjax.retrieval.base import Index
from kafjax.retrieval.index import load_index

_PASSAGES = "passages.jsonl"
_INDEX = "index"


class Store:
    """Passages and the index of their vectors, under the same ids.

        index = open_index()
        index.build([p.id for p in passages], embedder.embed([p.text for p in passages]))
        store = Store(index, passages, embedder.fingerprint)

    On disk: `passages.jsonl`, a folder `index`, and a manifest.
    """

    def __init__(self, index: Index, passages: Iterable[Passage], encoder: str = ""):
        """`encoder` is the fingerprint of the embedder that made the vectors, "" if unknown.

        Raises `UserError` naming an id that is in only one of the two, or twice.
        """
        self.index = index
        self.encoder = encoder
        self._passages: dict[str, Passage] = {}
        for passage in passages:
            if passage.id in self._passages:
                raise UserError(f"passage id '{passage.id}' is given twice; ids must be unique")
            self._passages[passage.id] = passage
        differing = set(index.ids) ^ self._passages.keys()
        if differing:
            id = min(differing)
            raise UserError(f"passage '{id}' has {'a text but no vector' if id in self._passages else 'a vector but no text'}")

    def __len__(self) -> int:
        return len(self._passages)

    def search(self, queries_QxD: np.ndarray, k: int) -> list[list[Passage]]:
        """The `k` nearest passages of each query, best first. Errors and clamping of `k` are those of `Index.search`."""
        ids, _ = self.index.search(queries_QxD, k)
        return [[self._passages[id] for id in row] for row in ids]

    def append(self, passages: Sequence[Passage], vectors_MxD: np.ndarray) -> None:
        """Adds passages with their vectors, without a rebuild. Errors are those of `Index.append`."""
        self.index.append([passage.id for passage in passages], vectors_MxD)
        self._passages.update((passage.id, passage) for passage in passages)

    def delete(self, ids: Sequence[str]) -> None:
        """Removes passages, without a rebuild. Raises `UserError` naming an unknown id."""
        self.index.delete(ids)
        for id in ids:
            del self._passages[id]

    def save(self, directory: Path | str) -> None:
        """Writes a folder, which may be moved. It replaces a store saved there before, whole or not at all.

        Raises `UserError` if the disk refuses, or if the folder holds something else.
        """
        with folder.replacing(Path(directory)) as path:
            write_atomic(path / _PASSAGES, self._text())
            (path / _INDEX).mkdir()
            self.index.write(path / _INDEX)
            folder.write_manifest(path, "store", count=len(self), encoder=self.encoder)

    @classmethod
    def load(cls, directory: Path | str, encoder: str | None = None) -> Self:
        """Reads a saved store.

        Raises `UserError` naming what is missing or damaged, or if its vectors come from another embedder than `encoder`, the
        fingerprint of the one that will make the queries: their neighbours would mean nothing.
        """
        return folder.reading(directory, lambda path: cls._load(path, encoder))

    @classmethod
    def _load(cls, directory: Path, encoder: str | None) -> Self:
        manifest = folder.read_manifest(directory, "store")
        made_by = manifest.encoder
        if encoder is not None and made_by not in ("", encoder):
            raise UserError(f"{directory} was built with another embedding model; give the --embedder it was built with, or build it again")
        path = directory / _PASSAGES
        if _PASSAGES not in manifest.files:
            raise UserError(f"{path} is missing; build and save the store again")
        passages = read_rows(Passage, path, fix="build and save the store again")
        index = load_index(directory / _INDEX)
        try:
            return cls(index, passages, made_by)
        except UserError as error:
            raise UserError(f"{directory}: {error}; build and save the store again") from error

    def n_bytes(self) -> int:
        """Bytes of the text and of the index on disk."""
        return len(self._text()) + self.index.n_bytes()

    def _text(self) -> bytes:
        # Escaped to ASCII: some readers take U+2028 and the like in a text for the end of a line.
        return "".join(json.dumps(dataclasses.asdict(passage)) + "\n" for passage in self._passages.values()).encode()
