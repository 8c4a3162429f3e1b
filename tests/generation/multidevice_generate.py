"""Run by test_multidevice.py in a process of its own, with eight fake devices: replies are those of
one device."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np

from kafjax import hub
from kafjax.core import trees
from kafjax.generation import Generator, Sampling
from kafjax.generation.decode import prefill
from kafjax.parallel import make_mesh
from tests import tiny

PROMPTS = [f"Where was number {i} born? {'She was born far away. ' * (i % 3)}" for i in range(11)]
GREEDY, DRAWN = (
    Sampling(max_new_tokens=20),
    Sampling(max_new_tokens=20, temperature=0.9, seed=3, stop=("\n",)),
)


def main(folder: Path) -> None:
    assert jax.device_count() == 8
    name = str(tiny.write_llama(folder / "model", vocab_size=1024))
    tokenizer = hub.tokenizer(name)
    model, params = hub.load(name)
    alone = Generator(model, tokenizer, batch=8)
    prefix = alone.prefix(params, "Short answers.\n")
    for spec in ("data:2,fsdp:2,tensor:2", "fsdp:8"):
        mesh = make_mesh(spec)
        _, spread = hub.load(name, mesh=mesh)
        many = Generator(model, tokenizer, batch=8, mesh=mesh)
        shared = many.prefix(spread, "Short answers.\n")
        for sampling, ours, theirs in ((GREEDY, shared, prefix), (DRAWN, None, None)):
            replies = [reply.tokens for reply in many.generate(spread, PROMPTS, sampling, ours)]
            assert replies == [
                reply.tokens for reply in alone.generate(params, PROMPTS, sampling, theirs)
            ], (spec, sampling)
        assert sizes_of_parts(many, spread) == {1 / 8}, spec
        print(f"{spec} answers as one device", flush=True)


def sizes_of_parts(generator: Generator, params: trees.Tree) -> set[float]:
    """Shares of the cache that the devices hold after prefill."""
    tokens_BxT, length_B = np.ones((8, 32), np.int32), np.full(8, 32, np.int32)
    _, cache = prefill(generator.model, params, tokens_BxT, length_B, None, np.int32(0), n_free=16)
    return {
        part.data.size / block.size
        for block in jax.tree.leaves(cache)
        for part in block.addressable_shards
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
