"""Passages, and the index of their vectors where there is one: the whole of what retrieval must keep."""

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
from kafjax.retrieval.base import Index, checked_ids
from kafjax.retrieval.index import load_index
from kafjax.retrieval.retriever import Hit

_PASSAGES = "passages.jsonl"
_INDEX = "index"


class Store:
    """Passages and the index of their vectors, under the same ids. Without an index they are searched by their words alone.

        index = open_index()
        index.build([p.id for p in passages], embedder.embed_documents([p.text for p in passages]))
        store = Store(index, passages, embedder.fingerprint)

    On disk: `passages.jsonl`, a folder `index` where there is one, and a manifest.
    """

    def __init__(self, index: Index | None, passages: Iterable[Passage], encoder: str = ""):
        """`encoder` is the fingerprint of the embedder that made the vectors, "" if unknown.

        Raises `UserError` naming an id that is in only one of the two, or twice.
        """
        self.index = index
        self.encoder = encoder
        self.n_changes = 0
        passages = list(passages)
        checked_ids([passage.id for passage in passages])
        self._passages = {passage.id: passage for passage in passages}
        differing = set(index.ids) ^ self._passages.keys() if index is not None else ()
        if differing:
            id = min(differing)
            raise UserError(f"passage '{id}' has {'a text but no vector' if id in self._passages else 'a vector but no text'}")

    def __len__(self) -> int:
        return len(self._passages)

    @property
    def ids(self) -> tuple[str, ...]:
        """All ids."""
        return tuple(self._passages) if self.index is None else self.index.ids

    @property
    def passages(self) -> list[Passage]:
        """All passages."""
        return list(self._passages.values())

    def search(self, queries_QxD: np.ndarray, k: int) -> list[list[Hit]]:
        """Finds the `k` nearest passages of each query, best first. Errors and clamping of `k` are those of `Index.search`.

        Raises:
          UserError: there are no vectors.
        """
        if self.index is None:
            raise UserError("these passages have no vectors; search them with --retriever=lexical, or build them with --retriever=dense")
        ids, scores_QxK = self.index.search(queries_QxD, k)
        return [
            [Hit(self._passages[id], score) for id, score in zip(row, scores, strict=True)]
            for row, scores in zip(ids, scores_QxK.tolist(), strict=True)
        ]

    def append(self, passages: Sequence[Passage], vectors_MxD: np.ndarray | None = None) -> None:
        """Adds passages, with their vectors where the store has an index, without a rebuild. Errors are those of `Index.append`."""
        ids = checked_ids([passage.id for passage in passages])
        if (self.index is None) != (vectors_MxD is None):
            raise UserError("passages need vectors where the others have some, and none where the others have none")
        if known := self._passages.keys() & set(ids):
            raise UserError(f"id '{min(known)}' is already in the index; delete it first to replace it")
        if self.index is not None:
            self.index.append(ids, vectors_MxD)
        self._passages.update((passage.id, passage) for passage in passages)
        self.n_changes += 1

    def delete(self, ids: Sequence[str]) -> None:
        """Removes passages, without a rebuild. Raises `UserError` naming an unknown id."""
        ids = checked_ids(ids)
        for id in ids:
            if id not in self._passages:
                raise UserError(f"id '{id}' is not in the index ({len(self)} ids)")
        if self.index is not None:
            self.index.delete(ids)
        for id in ids:
            del self._passages[id]
        self.n_changes += 1

    def save(self, directory: Path | str) -> None:
        """Writes a folder, which may be moved. It replaces a store saved there before, whole or not at all.

        Raises `UserError` if the disk refuses, or if the folder holds something else.
        """
        with folder.replacing(Path(directory)) as path:
            write_atomic(path / _PASSAGES, self._text())
            if self.index is not None:
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
        index = load_index(directory / _INDEX) if _INDEX in manifest.folders else None
        try:
            return cls(index, passages, made_by)
        except UserError as error:
            raise UserError(f"{directory}: {error}; build and save the store again") from error

    def n_bytes(self) -> int:
        """Bytes of the text and of the index on disk."""
        return len(self._text()) + (0 if self.index is None else self.index.n_bytes())

    def _text(self) -> bytes:
        # Escaped to ASCII: some readers take U+2028 and the like in a text for the end of a line.
        return "".join(json.dumps(dataclasses.asdict(passage)) + "\n" for passage in self._passages.values()).encode()
