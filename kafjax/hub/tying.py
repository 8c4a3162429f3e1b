"""The head of a model whose `config.json` ties it to the embedding.

As in transformers, the tensors of the file decide:

    the embedding                       the model is tied
    both, and they are equal            likewise
    both, and they differ               the model has a head of its own
    lm_head.weight and no embedding     the model is tied, and that is its embedding
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kafjax.hub import safetensors_in
from kafjax.hub.names import Table
from kafjax.hub.safetensors_in import StoredTensor

_EMBEDDING, _HEAD = "embed/embedding", "head/embedding"


def has_own_head(folder: Path, table: Table) -> bool:
    """True if a folder holds a head with other numbers than its embedding. Both are read if both
    are there.

    Raises `UserError` as `safetensors_in.read_tensors` does.
    """
    names = _names(folder, table)
    return len(names) == 2 and not safetensors_in.equal(folder, names[_EMBEDDING], names[_HEAD])


def read_tied(folder: Path, table: Table) -> Iterator[tuple[str, StoredTensor]]:
    """Yields `(name, tensor)` of a tied model as `safetensors_in.read_tensors` does; a head without
    an embedding gets its name."""
    names = _names(folder, table)
    new_names = {names[_HEAD]: _tensor(table, _EMBEDDING)} if set(names) == {_HEAD} else {}
    for name, tensor in safetensors_in.read_tensors(folder):
        yield new_names.get(name, name), tensor


def _names(folder: Path, table: Table) -> dict[str, str]:
    """Names of the embedding and the head in the file, by path. A missing one is left out."""
    wanted = {_tensor(table, path): path for path in (_EMBEDDING, _HEAD)}
    return {
        wanted[found]: name
        for name, _ in safetensors_in.read_tensors(folder)
        if (found := table.canonical(name)) in wanted
    }


def _tensor(table: Table, path: str) -> str:
    return next(entry.tensor for entry in table.entries if entry.path == path)
