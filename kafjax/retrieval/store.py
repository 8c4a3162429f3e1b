"""Passages, and the index of their vectors where there is one: the whole of what retrieval must
keep."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from kafjax.core.errors import UserError
from kafjax.core.records import Passage
from kafjax.core.schema import read_rows
from kafjax.retrieval import folder, mirror, segments, texts
from kafjax.retrieval.base import Index, Stats
from kafjax.retrieval.folder import Manifest
from kafjax.retrieval.index import index_for, load_index
from kafjax.retrieval.retriever import Hit
from kafjax.retrieval.segments import Rows, checked_ids
from kafjax.retrieval.texts import PASSAGES, Texts

_INDEX = "index"  # the folder of the vectors in format 1


class Store:
    """Passages and the index of their vectors, under the same ids. Without an index they are
    searched by their words alone.

        >>> from kafjax.retrieval import ExactIndex
        >>> index = ExactIndex()
        >>> index.build(["a", "b"], np.eye(2))
        >>> store = Store(index, [Passage("a", "Mira draws maps."), Passage("b", "Ada paints bells.")])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store.save(folder)
        ...     (hits,) = Store.load(folder).search(np.array([[0.1, 0.9]]), k=1)
        >>> hits[0].passage.text
        'Ada paints bells.'

    On disk it is segments of ids, texts and vectors: see `kafjax.retrieval.segments`. Texts are
    read from there when they are asked for. A folder may be an address of a bucket
    (`kafjax.retrieval.mirror`).
    """

    def __init__(self, index: Index | None, passages: Iterable[Passage], encoder: str = ""):
        """`encoder` is the fingerprint of the embedder that made the vectors, "" if unknown.

        Raises `UserError` naming an id that is in only one of the two, or twice, or whose passage
        is empty.
        """
        self.index = index
        self.encoder = encoder
        self.n_changes = 0
        passages = list(passages)
        check_texts(passages)
        self._rows, self._texts = Rows(checked_ids([passage.id for passage in passages])), Texts()
        self._texts.add(passages)
        differing = set(index.ids) ^ self._rows.number.keys() if index is not None else ()
        if differing:
            id = min(differing)
            raise UserError(
                f"passage '{id}' has {'a text but no vector' if id in self._rows.number else 'a vector but no text'}"
            )
        if index is not None:
            self._rows = Rows(index.ids)  # one order for both

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def ids(self) -> tuple[str, ...]:
        """All ids."""
        return tuple(self._rows.ids)

    @property
    def passages(self) -> list[Passage]:
        """All passages."""
        return self._read(self._rows.ids)

    def passage(self, id: str) -> Passage:
        """Reads the passage of an id. Raises `KeyError` for an id that is not there, `UserError`
        for a damaged line."""
        (passage,) = self._read([id])
        return passage

    def _read(self, ids: Sequence[str]) -> list[Passage]:
        numbers = self._rows.numbers_of(ids)
        return [self._texts.passage(id, number) for id, number in zip(ids, numbers, strict=True)]

    @property
    def stats(self) -> Stats:
        """Size, engine and state on disk."""
        index = self.index
        if index is None:
            return Stats.of(self._rows, "", None, "by words: there are no vectors")
        return Stats.of(self._rows, index.engine, index.dimension, index.how)

    def search(self, queries_QxD: np.ndarray, k: int) -> list[list[Hit]]:
        """Finds the `k` nearest passages of each query, best first. Errors and clamping of `k` are
        those of `Index.search`.

        Raises:
          UserError: there are no vectors.
        """
        if self.index is None:
            raise UserError(
                "these passages have no vectors; search them with --retriever=lexical, or build them with --retriever=dense"
            )
        ids, scores_QxK = self.index.search(queries_QxD, k)
        once = list(dict.fromkeys(itertools.chain.from_iterable(ids)))  # questions share passages
        passages = dict(zip(once, self._read(once), strict=True))
        return [
            [Hit(passages[id], score) for id, score in zip(row, scores, strict=True)]
            for row, scores in zip(ids, scores_QxK.tolist(), strict=True)
        ]

    def append(self, passages: Sequence[Passage], vectors_MxD: np.ndarray | None = None) -> None:
        """Adds passages, with their vectors where the store has an index, without a rebuild. Errors
        are those of `Index.append`."""
        ids = checked_ids([passage.id for passage in passages])
        check_texts(passages)
        if (self.index is None) != (vectors_MxD is None):
            raise UserError(
                "passages need vectors where the others have some, and none where the others have none"
            )
        for id in ids:
            if id in self._rows.number:
                raise UserError(f"id '{id}' is already in the index; delete it first to replace it")
        if self.index is not None and vectors_MxD is not None:
            self.index.append(ids, vectors_MxD)
        self._rows.append(ids)
        self._texts.add(passages)
        self.n_changes += 1

    def upsert(self, passages: Sequence[Passage], vectors_MxD: np.ndarray | None = None) -> None:
        """Adds passages, in place of those of the same ids. Errors are those of `Index.upsert`."""
        ids = checked_ids([passage.id for passage in passages])
        check_texts(passages)
        if (self.index is None) != (vectors_MxD is None):
            raise UserError(
                "passages need vectors where the others have some, and none where the others have none"
            )
        if self.index is not None and vectors_MxD is not None:
            self.index.upsert(ids, vectors_MxD)
        self._drop([id for id in ids if id in self._rows.number])
        self._rows.append(ids)
        self._texts.add(passages)
        self.n_changes += 1

    def delete(self, ids: Sequence[str]) -> None:
        """Removes passages, without a rebuild. Raises `UserError` naming an unknown id."""
        ids = checked_ids(ids)
        for id in ids:
            if id not in self._rows.number:
                raise UserError(f"id '{id}' is not in the index ({len(self)} ids)")
        if self.index is not None:
            self.index.delete(ids)
        self._drop(ids)
        self.n_changes += 1

    def save(self, directory: Path | str) -> None:
        """Writes a folder, which may be moved. It replaces a store saved there before, whole or not
        at all.

        Saving again to the same folder costs what has changed. Raises `UserError` if the disk
        refuses, if the folder holds something else, or if another process has changed it since.
        """
        before, writers = self._rows.log, (self._write_all, self._write_new)
        with mirror.changing(directory) as path:
            ids = segments.save(path, "store", self._rows, *writers, **self._fields())
        log = self._rows.log
        if log is None or log is before:
            return
        if len(log.segments) == 1:
            self._texts = Texts()
        self._texts.drop(ids)
        newest = log.segments[-1]
        self._texts.open([log.directory / newest.name], [newest.count])

    @classmethod
    def load(cls, directory: Path | str, encoder: str | None = None) -> Self:
        """Reads a saved store.

        Raises `UserError` naming what is missing or damaged, or if its vectors come from another
        embedder than `encoder`, the fingerprint of the one that will make the queries: their
        neighbours would mean nothing.
        """
        return folder.reading(mirror.fetched(directory), lambda path: cls._load(path, encoder))

    @classmethod
    def _load(cls, directory: Path, encoder: str | None) -> Self:
        manifest = folder.read_manifest(directory, "store")
        made_by = manifest.encoder
        if encoder is not None and made_by not in ("", encoder):
            raise UserError(
                f"{directory} was built with another embedding model; give the --embedder and --embedder_dtype it was built with, or build it again"
            )
        if manifest.format == 1:
            return cls._load_format_1(directory, manifest)
        store = cls(None, (), made_by)
        with folder.checking(directory, manifest, by_size=frozenset([PASSAGES])) as wait:
            store._rows, live = segments.read(directory, manifest)
            paths = [directory / segment.name for segment in manifest.segments]
            if manifest.engine:
                store.index = index_for(directory, manifest)
                store.index.restore(paths, manifest, store._rows.ids, live, wait)
            store._texts.open(paths, [segment.count for segment in manifest.segments])
        return store

    @classmethod
    def _load_format_1(cls, directory: Path, manifest: Manifest) -> Self:
        """Reads a store of the release before, whose texts were one file and whose vectors a
        folder. The next save makes it segments."""
        path = directory / PASSAGES
        if PASSAGES not in manifest.files:
            raise UserError(f"{path} is missing; {folder.AGAIN}")
        with folder.checking(directory, manifest):
            passages = read_rows(Passage, path, fix=folder.AGAIN)
        index = load_index(directory / _INDEX) if _INDEX in manifest.folders else None
        try:
            return cls(index, passages, manifest.encoder)
        except UserError as error:
            raise UserError(f"{directory}: {error}; {folder.AGAIN}") from error

    def n_bytes(self) -> int:
        """Bytes of a fresh save but for the manifest. Measured, by saving into a temporary
        folder."""
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / "all"
            segments.save(
                path, "store", Rows(self.ids), self._write_all, self._write_new, **self._fields()
            )
            return folder.size_on_disk(path) - (path / folder.MANIFEST).stat().st_size

    def _drop(self, ids: Sequence[str]) -> None:
        self._rows.delete(ids)
        self._texts.drop(ids)

    def _fields(self) -> dict[str, Any]:
        return {"encoder": self.encoder, **({} if self.index is None else self.index.fields())}

    def _write_all(self, path: Path) -> tuple[list[str], dict[str, Any]]:
        ids, fields = (self._rows.ids, {}) if self.index is None else self.index.write_all(path)
        texts.write(path, (self._texts.line(id, self._rows.number[id]) for id in ids))
        return ids, fields

    def _write_new(self, path: Path, ids: list[str]) -> None:
        if self.index is not None:
            self.index.write_new(path, ids)
        texts.write(path, (self._texts.line(id, self._rows.number[id]) for id in ids))


def check_texts(passages: Iterable[Passage]) -> None:
    """Raises `UserError` naming a passage without text: it would be found for no reason."""
    for passage in passages:
        if not passage.text or passage.text.isspace():
            raise UserError(f"passage '{passage.id}' is empty; leave it out")
