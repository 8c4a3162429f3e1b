"""Results of full fine-tuning: the parameters that it changed, under their own paths, written from
a mesh and read back onto one.

>>> import tempfile
>>> params = {"embed": {"embedding": jax.numpy.zeros((3, 2))}, "q_proj": {"kernel": jax.numpy.zeros((2, 2))}}
>>> with tempfile.TemporaryDirectory() as folder:
...     n_bytes = save_trained(Path(folder), {"q_proj": {"kernel": jax.numpy.ones((2, 2))}})
...     params = load_trained(Path(folder), params)
>>> params["q_proj"]["kernel"].tolist(), params["embed"]["embedding"].shape
([[1.0, 1.0], [1.0, 1.0]], (3, 2))
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kafjax.core import paths, trees
from kafjax.core.errors import UserError
from kafjax.hub.safetensors_in import StoredTensor, read_tensors
from kafjax.hub.safetensors_out import SHARD_BYTES, write_tensors
from kafjax.parallel import distributed

STEM = "weights"


def save_trained(folder: Path, trained: trees.Tree, *, shard_bytes: int = SHARD_BYTES) -> int:
    """Writes `weights.safetensors`, or shards of it with an index, and returns the bytes.

    The arrays may be spread over many processes: all have to call it, process 0 writes. Its host
    holds a shard (5 GB) or the largest array at a time, a device beside its own parts one layer of
    an array.

    Raises `UserError` if they cannot be written.
    """
    tensors = ((path, distributed.to_host(leaf)) for path, leaf in trees.flatten(trained).items())
    if not distributed.is_main():
        for _ in tensors:  # takes part in gathering
            pass
        return trees.n_bytes(trained)
    try:
        paths.make_folder(folder)
        for file in folder.glob(f"{STEM}*.safetensors*"):
            file.unlink()  # of an earlier attempt, which may have had shards
        if paths.is_address(folder):
            with tempfile.TemporaryDirectory(prefix="kafjax-") as here:
                write_tensors(Path(here), tensors, stem=STEM, shard_bytes=shard_bytes)
                for file in sorted(Path(here).iterdir(), key=lambda file: file.suffix == ".json"):
                    paths.upload(file, folder / file.name)  # the index last
        else:
            write_tensors(folder, tensors, stem=STEM, shard_bytes=shard_bytes)
        return sum(map(paths.size, folder.glob(f"{STEM}*.safetensors*")))
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error


def load_trained(folder: Path, params: trees.Tree) -> trees.Tree:
    """Returns `params` with the arrays that `save_trained` wrote to `folder`.

    Each array takes the dtype and sharding of the one it replaces, whose values are not read. A
    device reads its own part.

    Raises `UserError` naming a tensor that `params` has no place for, and for damaged files.
    """
    leaves = trees.flatten(params)
    found: dict[str, jax.Array] = {}
    for path, tensor in read_tensors(folder, STEM):
        leaf = leaves.get(path)
        if leaf is None or tuple(tensor.shape) != leaf.shape:
            there = "has no such parameter" if leaf is None else f"has {list(leaf.shape)} there"
            raise UserError(
                f"{folder}: '{path}' is of shape {list(tensor.shape)}, the model {there}; it was trained from another one"
            )
        found[path] = _placed(tensor, leaf)
    return trees.unflatten({**leaves, **found})


def _placed(tensor: StoredTensor, leaf: Any) -> jax.Array:
    def part(index: Any) -> np.ndarray:
        return np.asarray(tensor[index]).astype(leaf.dtype)

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)
