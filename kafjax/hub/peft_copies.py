"""Tables of the base that PEFT stores beside an adapter: copies, where the vocabulary was resized
or `save_embedding_layers` is on.

    model.embed_tokens.weight                            a copy, unless it is one of modules_to_save
    model.embed_tokens.base_layer.weight                 what an adapter of it stands beside
    model.embed_tokens.token_adapter.base_layer.weight   what trained rows stand beside
    model.embed_tokens.original_module.weight            what a table trained in full has replaced: no matter
    model.embed_tokens.modules_to_save.weight            that table again

PEFT uses a copy instead of the base's table. A copy with the same numbers is ignored. One that
differs in some rows, as where a base was resized twice, is applied: it becomes a parameter that is
trained in full. Any other one belongs to another base and is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from kafjax.core.errors import UserError
from kafjax.hub.peft_base import DELTA, EMBEDDING, PREFIX, Base, split
from kafjax.hub.peft_config import UNTIED, Resolved

_COPIES = ("weight", "base_layer.weight", "token_adapter.base_layer.weight")
_TWICE = ("original_module.weight", "modules_to_save.weight")


def without_copies(
    stored: Mapping[str, np.ndarray], described: Resolved, base: Base, folder: Path
) -> tuple[dict[str, np.ndarray], Resolved]:
    """Drops the tensors that change nothing, and adds to `described` the tables that the others
    change.

    Raises `UserError` naming a copy that can be neither passed over nor applied. Of an abstract
    base only shapes are compared.
    """
    kept: dict[str, np.ndarray] = {}
    trained = {base.where[name][0] for name in described.trained}
    taken = (
        trained
        | {base.where[f"{module}.weight"][0] for module in described.ranks}
        | ({EMBEDDING} if described.token_rows else set())
    )
    changed: set[str] = set()
    # a tied head behind its embedding
    for name, array in sorted(stored.items(), key=lambda item: split(item[0])[0] == base.head):
        module, part = split(name)
        path = base.table_of(module)
        is_tied_head = bool(base.head) and module == base.head
        if part == "lora_velora_embed" or base.is_beside(name):
            continue  # of training, or of a larger model around the base
        is_copy = path and part in _COPIES and not (part == "weight" and path in trained)
        if is_tied_head and part == DELTA:
            if not np.array_equal(array, stored.get(f"{PREFIX}{base.embedding}.{DELTA}", ())):
                raise UserError(
                    f"{folder}: tensor {name!r} is not as that of the embedding; {UNTIED}"
                )
        elif is_copy:
            rows = _differing(array, base, path, described.token_rows, f"{folder}: tensor {name!r}")
            if is_tied_head and rows.any() and EMBEDDING not in trained | changed:
                raise UserError(f"{folder}: tensor {name!r} is not as the embedding; {UNTIED}")
            if not rows.any() and not (is_tied_head and path in changed):
                continue
            if part != "weight" or path in taken or 2 * rows.sum() > len(rows):
                raise UserError(
                    f"{folder}: tensor {name!r} is not the table of this base, of which {rows.sum()} of {len(rows)} rows differ; "
                    "was it trained beside another?"
                )
            kept[name] = array
            changed.add(path)
        elif not (path and part in _TWICE):
            kept[name] = array
    in_full = {name for name, (path, _) in base.where.items() if path in changed}
    return kept, dataclasses.replace(described, trained=described.trained | in_full)


def _differing(
    array: np.ndarray, base: Base, path: str, token_rows: tuple[int, ...], what: str
) -> np.ndarray:
    """Marks the rows of a copy that differ from the base, to the precision of the coarser of the
    two: `bool [V]`."""
    leaf: Any = base.leaves[path]
    if array.shape != leaf.shape:
        raise UserError(
            f"{what} has shape {list(array.shape)}, this base has {list(leaf.shape)}; "
            "for an adapter to a resized vocabulary, resize the base alike and save it"
        )
    if base.is_abstract:
        return np.zeros(len(array), bool)
    coarser = max((jnp.finfo(array.dtype), jnp.finfo(leaf.dtype)), key=lambda info: float(info.eps))
    close = np.isclose(
        array.astype(np.float32),
        np.asarray(leaf, np.float32),
        rtol=float(coarser.eps),
        atol=float(coarser.smallest_subnormal),
    )
    rows: np.ndarray = np.logical_not(np.all(close, axis=1))
    if path == EMBEDDING:
        rows[[i for i in token_rows if i < len(rows)]] = False  # they are given
    return rows
