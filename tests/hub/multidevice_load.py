"""Run by test_streaming.py in a process of its own, with eight fake devices."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kafjax import hub
from kafjax.core import trees
from kafjax.hub import names, safetensors_in
from kafjax.hub.assemble import assemble
from kafjax.models import CONFIGS, Decoder
from kafjax.parallel import make_mesh, shardings

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "mlp_size": 24,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 8,
}
CONFIG = dataclasses.replace(
    CONFIGS["qwen2.5-7b"],
    **SIZES,
    sliding=(False, False),
    attention_scale=8**-0.5,
    bos_id=None,
    eos_id=1,
)
MODEL = Decoder(CONFIG)


class Counted:
    """A tensor in a file that notes how large the parts are that are read."""

    def __init__(self, tensor: Any):
        self.shape, self.parts, self._tensor = tensor.shape, [], tensor

    def __getitem__(self, index: Any) -> np.ndarray:
        part = self._tensor[index]
        self.parts.append(part.size)
        return part


def parts_read(folder: Path, mesh: jax.sharding.Mesh) -> dict[str, tuple[int, list[int]]]:
    """Sizes of each tensor and of the parts that the devices read."""
    counted: dict[str, Counted] = {}
    abstract = MODEL.abstract_params()
    places = shardings(MODEL.axes(), abstract, mesh)
    abstract = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract,
        places,
    )

    def tensors():
        for name, tensor in safetensors_in.read_tensors(folder):
            counted[name] = Counted(tensor)
            yield name, counted[name]

    assemble(tensors(), names.TABLES[CONFIG.family], abstract, "folder")
    return {name: (math.prod(tensor.shape), tensor.parts) for name, tensor in counted.items()}


def main(root: str) -> None:
    folder = Path(root) / "saved"
    hub.save(folder, MODEL, jax.jit(MODEL.init)(jax.random.key(0)), shard_bytes=5000)
    _, whole = hub.load(str(folder))
    mesh = make_mesh("data:2,fsdp:2,tensor:2")
    model, params = hub.load(str(folder), mesh=mesh)
    places = trees.flatten(shardings(model.axes(), model.abstract_params(), mesh))
    for path, leaf in trees.flatten(params).items():
        assert leaf.sharding.is_equivalent_to(places[path], leaf.ndim), (path, leaf.sharding)
    hub.save(Path(root) / "again", model, params)
    for same in (params, hub.load(str(Path(root) / "again"))[1]):
        jax.tree.map(np.testing.assert_array_equal, same, whole)
    print("equal to one device, and saved as it was")
    for name, (size, parts) in parts_read(folder, mesh).items():
        n_shares = 2 if "norm" in name or "bias" in name else 4
        assert set(parts) == {size // n_shares}, (name, size, parts)
    print("a device reads its part only")


if __name__ == "__main__":
    main(sys.argv[1])
