"""An adapter on disk: one safetensors file with the spec in its metadata.

>>> import tempfile
>>> base, spec = {"q_proj": {"kernel": np.zeros((2, 2))}}, Spec(rank=1)
>>> adapters = {"q_proj/kernel": {"a": np.ones((2, 1), np.float32), "b": np.ones((1, 2), np.float32)}}
>>> with tempfile.TemporaryDirectory() as folder:
...     save(Path(folder) / "adapter.safetensors", adapters, spec)
...     loaded, loaded_spec = load(Path(folder) / "adapter.safetensors", base)
>>> loaded_spec == spec, loaded["q_proj/kernel"]["b"].tolist()
(True, [[1.0, 1.0]])
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from kafjax.core.errors import UserError
from kafjax.core.paths import local
from kafjax.core.rundir import write_atomic
from kafjax.lora.spec import Spec
from kafjax.lora.transform import Adapters, check_adapters

ADAPTER = "adapter.safetensors"
"""Name of an adapter's file in the folders of runs, lanes and methods."""

_FORMAT = "kafjax-lora-1"


def save(path: Path, adapters: Adapters, spec: Spec) -> None:
    """Writes tensors `"<kernel path>/a"` and `"/b"`, whole or not at all.

    Raises `UserError` for NaN or infinity in them, and for an adapter that needs another base than
    the model's: `plain` makes one of it that does not.
    """
    if spec.changes_base:
        raise UserError(
            f"an adapter with init={spec.init!r} stands beside what it left of the base; save what `lora.plain` makes of it"
        )
    tensors = {
        f"{kernel}/{name}": np.asarray(array)
        for kernel, pair in adapters.items()
        for name, array in pair.items()
    }
    check_finite(tensors, "the adapter to be saved")
    metadata = {"format": _FORMAT, "spec": json.dumps(dataclasses.asdict(spec))}
    write_atomic(path, safetensors.numpy.save(tensors, metadata))


def load(path: Path, params: Mapping[str, Any]) -> tuple[Adapters, Spec]:
    """Reads what `save` wrote: `adapters, spec = load(path, params)`.

    Args:
      path: the file.
      params: the base it is meant for; only shapes are read, so abstract ones will do.

    Raises:
      UserError: no such file, truncated or not written by `save`, NaN inside, or made for another
        base.
    """
    if not path.is_file():
        raise UserError(f"no adapter at {path}")
    try:
        with local(path) as here, safe_open(here, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or truncated safetensors file ({error})") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if metadata.get("format") != _FORMAT:
        raise UserError(
            f"{path}: not an adapter that kafjax wrote (format {metadata.get('format')!r}, expected {_FORMAT!r})"
        )
    try:
        spec = _spec(json.loads(metadata.get("spec", "")))
    except (ValueError, RecursionError, UserError) as error:
        raise UserError(f"{path}: its spec cannot be read ({error})") from error
    check_finite(tensors, str(path))
    adapters: Adapters = {}
    for name, tensor in tensors.items():
        kernel, _, part = name.rpartition("/")
        adapters.setdefault(kernel, {})[part] = jnp.asarray(tensor, jnp.float32)
    try:
        check_adapters(params, adapters, spec)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return adapters, spec


def _spec(stored: Any) -> Spec:
    """A spec from its JSON. Raises `UserError` for a field that there is none of, and for values as
    `Spec` does."""
    if not isinstance(stored, dict):
        raise UserError("it is not a JSON object")
    if unknown := sorted(set(stored) - {field.name for field in dataclasses.fields(Spec)}):
        raise UserError(f"it has a field {unknown[0]!r:.80}, which this version does not know")
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()
    }
    return Spec(**values)  # with the tuples that JSON lacks


def check_finite(tensors: Mapping[str, np.ndarray], source: str) -> None:
    """Raises `UserError` naming a tensor that holds NaN or infinity, and the `source` that it was
    read from."""
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise UserError(f"{source}: '{name}' holds NaN or infinity")
