"""Named tensors -> a parameter tree, streamed: at most one tensor is alive beside the tree. Anything odd is fatal."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.hub.names import Entry


def assemble(
    tensors: Iterable[tuple[str, np.ndarray]],
    entries: Iterable[Entry],
    abstract: trees.Tree,
    source: str,
    *,
    unused: re.Pattern[str] | None = None,
    prefix: str = "",
) -> trees.Tree:
    """Fills `abstract` (float32) from `(name, tensor)` pairs by the table `entries`.

    Raises `UserError` that names the tensor for an extra, missing, duplicate, misshapen or non-finite one.
    """
    shapes = {path: leaf.shape for path, leaf in trees.flatten(abstract).items()}
    expected: dict[str, tuple[Entry, int | None]] = {}
    for entry in entries:
        layers = range(shapes[entry.path][0]) if "{i}" in entry.tensor else (None,)
        expected.update({entry.tensor.replace("{i}", str(layer)): (entry, layer) for layer in layers})
    params = {path: np.empty(shape, np.float32) for path, shape in shapes.items()}
    seen: set[str] = set()
    for full_name, tensor in tensors:
        name = full_name.removeprefix(prefix)
        if name not in expected:
            if unused and unused.fullmatch(name):
                continue
            raise UserError(f"{source}: extra tensor '{full_name}' that this model has no place for")
        if name in seen:
            raise UserError(f"{source}: tensor '{full_name}' is there twice")
        seen.add(name)
        entry, layer = expected[name]
        target = params[entry.path] if layer is None else params[entry.path][layer]
        value = tensor.T if entry.transpose else tensor
        if value.shape != target.shape:
            raise UserError(
                f"{source}: tensor '{full_name}' has shape {list(tensor.shape)}, "
                f"config.json asks for {list(target.shape[::-1] if entry.transpose else target.shape)}"
            )
        np.add(value, np.float32(entry.offset), out=target, casting="unsafe")
        if not np.isfinite(target).all():
            raise UserError(f"{source}: tensor '{full_name}' holds NaN or infinity; the file is damaged")
    if missing := [name for name in expected if name not in seen]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{source}: tensor '{missing[0]}'{more} missing")
    return trees.unflatten(params)
