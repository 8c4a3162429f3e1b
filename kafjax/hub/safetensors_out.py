"""Our parameters under the names, and in the layout, of a Hugging Face checkpoint: the way back of `assemble`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from kafjax.core import trees
from kafjax.hub.names import Entry


def hf_tensors(params: trees.Tree, entries: Iterable[Entry]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields `(name, contiguous float32 array)` one at a time, by the table of the model's family (`names.GEMMA3`, `names.BERT`)."""
    flat = trees.flatten(params)
    for entry in entries:
        leaf = np.asarray(flat[entry.path])
        layers = enumerate(leaf) if "{i}" in entry.tensor else [("", leaf)]
        for layer, value in layers:
            value = value - np.float32(entry.offset) if entry.offset else value
            yield entry.tensor.replace("{i}", str(layer)), np.ascontiguousarray(value.T if entry.transpose else value)
