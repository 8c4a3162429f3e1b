"""Tensors out of a Hugging Face folder: one file of safetensors, or shards with an index."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pydantic
from safetensors import SafetensorError, safe_open

from kafjax.core.errors import UserError
from kafjax.core.paths import local
from kafjax.core.schema import read

INDEX = "model.safetensors.index.json"
DTYPES = ("F64", "F32", "F16", "BF16")
_ROWS = 1024


class StoredTensor:
    """A tensor in an open file; `[index]` reads that part of it, unless it is not of floating-point
    numbers."""

    def __init__(self, path: Path, name: str, part: Any):
        self.shape = tuple(part.get_shape())
        self._path, self._name, self._part = path, name, part

    def __getitem__(self, index: Any) -> np.ndarray:
        # Told here, not at opening: what nobody reads, such as BERT's int64 position_ids, may be of
        # any type.
        if (dtype := self._part.get_dtype()) not in DTYPES:
            raise UserError(
                f"{self._path}: tensor {self._name!r} is of type {dtype}; only {', '.join(DTYPES)} are read"
            )
        try:
            return self._part[index]
        except SafetensorError as error:
            raise UserError(
                f"tensor {self._name!r} cannot be read ({error}); copy its file again"
            ) from error


def read_tensors(folder: Path, stem: str = "model") -> Iterator[tuple[str, StoredTensor]]:
    """Yields `(name, tensor)` one at a time, to be read before the next one is asked for.

    They are those of `{stem}.safetensors`. Without that file they are those of the shards that
    `{stem}.safetensors.index.json` names: as in transformers, an index beside a single file is a
    leftover. Raises `UserError` naming a file that is missing, truncated or corrupt, and a tensor
    that is not where the index says; reading one that is not of floating-point numbers raises it
    too (quantised checkpoints are not read).
    """
    index = folder / f"{stem}.safetensors.index.json"
    for file_name, promised in _files(folder / f"{stem}.safetensors", index).items():
        path = folder / file_name
        try:
            with local(path) as here, safe_open(here, framework="numpy") as file:
                names = list(file.keys())
                if lost := sorted(promised - set(names)):
                    raise UserError(
                        f"{index}: names tensor {lost[0]!r} in {file_name}, which does not hold it"
                    )
                for name in names:
                    yield name, StoredTensor(path, name, file.get_slice(name))
        except SafetensorError as error:
            raise UserError(
                f"{path}: damaged or truncated safetensors file ({error}); copy it again"
            ) from error


def equal(folder: Path, one: str, other: str) -> bool:
    """True if two matrices of a folder have the same shape and numbers. A thousand rows are read at
    a time.

    Raises `UserError` as `read_tensors` does.
    """
    with _opened(folder, one) as a, _opened(folder, other) as b:
        if a.shape != b.shape or len(a.shape) != 2:
            return False
        parts = (
            slice(start, min(start + _ROWS, a.shape[0])) for start in range(0, a.shape[0], _ROWS)
        )
        return all(
            np.array_equal(np.asarray(a[part], np.float32), np.asarray(b[part], np.float32))
            for part in parts
        )


@contextlib.contextmanager
def _opened(folder: Path, name: str) -> Generator[StoredTensor]:
    for found, tensor in read_tensors(folder):
        if found == name:
            yield tensor  # whose file is open as long as this loop stands here
            return


@dataclasses.dataclass(frozen=True)
class _Index:
    """The part of `model.safetensors.index.json` that is read: the shard of each tensor."""

    weight_map: Annotated[
        dict[str, Annotated[str, pydantic.Field(max_length=200)]], pydantic.Field(min_length=1)
    ]


def _files(single: Path, index: Path) -> dict[str, set[str]]:
    """Maps each file of tensors to the names that the index promises in it."""
    folder = single.parent
    if single.exists():
        return {single.name: set()}
    if not index.exists():
        raise UserError(f"{folder}: no {single.name} and no {index.name} in it")
    weight_map = read(_Index, index).weight_map
    _refuse_repeated(index)
    files: dict[str, set[str]] = {}
    for tensor, name in sorted(weight_map.items(), key=lambda item: item[1]):
        files.setdefault(name, set()).add(tensor)
    for name in files:
        if Path(name).name != name or "\0" in name:
            raise UserError(f"{index}: shard '{name}' is not a plain file name")
        if not (folder / name).is_file():
            raise UserError(f"{folder}: shard '{name}' is named by the index but missing")
    return files


def _refuse_repeated(path: Path) -> None:
    """Raises `UserError` for a repeated key, of which `json` would silently take the last."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if repeated := [
            key for key, n in collections.Counter(key for key, _ in items).items() if n > 1
        ]:
            raise UserError(f"{path}: names {repeated[0]!r} twice")
        return dict(items)

    json.loads(path.read_bytes(), object_pairs_hook=pairs)
