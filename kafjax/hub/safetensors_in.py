"""Tensors out of a Hugging Face folder: one `model.safetensors`, or shards with an index."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from kafjax.core.errors import UserError
from kafjax.core.rundir import read_json

INDEX = "model.safetensors.index.json"


def read_tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yields `(name, array)` one at a time. Raises `UserError` naming a file that is missing, truncated or corrupt."""
    for path in _files(folder):
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{path}: damaged or truncated safetensors file ({error}); copy it again") from error


def _files(folder: Path) -> list[Path]:
    single = folder / "model.safetensors"
    if (folder / INDEX).exists():
        index = read_json(folder / INDEX)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{folder / INDEX}: has no 'weight_map'")
        names = sorted({str(name) for name in weight_map.values()})
    elif single.exists():
        names = [single.name]
    else:
        raise UserError(f"{folder}: no model.safetensors and no {INDEX} in it")
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{folder / INDEX}: shard '{name}' is not a plain file name")
        if not (folder / name).exists():
            raise UserError(f"{folder}: shard '{name}' is named by the index but missing")
    return [folder / name for name in names]
