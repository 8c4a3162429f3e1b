"""Caches that are as long as the window where layers slide."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kafjax.models import CONFIGS, Decoder, DecoderConfig, caches
from kafjax.ops.attention import NEVER, ages

WINDOW = 5
MIXED = DecoderConfig(
    vocab_size=8,
    hidden_size=4,
    mlp_size=4,
    n_layers=3,
    n_heads=1,
    n_kv_heads=1,
    head_dim=2,
    sliding=(True, False, True),
    window=WINDOW,
)
ALL_SLIDE = dataclasses.replace(MIXED, sliding=(True,) * 3)


def keys_at(config, positions_BxT):
    """Keys and values that say their layer and position, in the form that `hidden` returns."""
    layers = {
        kind: [i for i, s in enumerate(config.sliding) if s == (kind == "sliding")]
        for kind in caches.KINDS
    }

    def of(numbers):
        shape = (len(numbers), *positions_BxT.shape, 1, 2)
        numbers = jnp.asarray(numbers, jnp.float32)[:, None, None, None, None]
        return jnp.broadcast_to(1000 * numbers + positions_BxT[None, :, :, None, None], shape)

    if config is ALL_SLIDE:
        return {name: of(layers["sliding"]) for name in ("k", "v")}
    return {kind: {name: of(layers[kind]) for name in ("k", "v")} for kind in caches.KINDS}


def in_sight(block, next_B, window):
    """Positions that a row's next token would see in a layer's cache."""
    age_BxN = np.asarray(ages(jnp.asarray(next_B), block.shape[2]))
    seen = age_BxN < min(window, NEVER)
    return [sorted(np.asarray(block)[0, row, seen[row], 0, 0] % 1000) for row in range(len(next_B))]


@pytest.mark.parametrize("config", [MIXED, ALL_SLIDE], ids=["both kinds", "all slide"])
@pytest.mark.parametrize("whole", [False, True])
def test_every_row_finds_the_positions_of_its_window_however_they_came(config, whole):
    """A prefix of one length for all rows, prompts of several lengths with padding, then token by
    token."""
    rows, prefix, padded = 4, 9, 8
    start_B, end_B = np.full(rows, prefix), prefix + np.array([1, 3, 8, 5])
    first = jnp.broadcast_to(jnp.arange(16), (rows, 16))  # seven of them are padding
    cache = caches.extended(
        config, None, keys_at(config, first), np.zeros(rows, int), start_B, slots=16
    )
    then = prefix + jnp.broadcast_to(jnp.arange(padded), (rows, padded))
    cache = caches.extended(
        config, cache, keys_at(config, then), start_B, end_B, slots=32, whole=whole
    )
    for step in range(7):
        for kind, block in (("sliding", cache), ("full", cache)):
            if config is ALL_SLIDE and kind == "full":
                continue
            block = block["k"] if config is ALL_SLIDE else block[kind]["k"]
            window = WINDOW if kind == "sliding" else NEVER
            expected = [list(range(max(0, n - window + 1), n)) for n in end_B]
            assert in_sight(block, end_B, window) == expected, (kind, step)
        cache = caches.written(
            cache, keys_at(config, jnp.asarray(end_B)[:, None]), jnp.asarray(end_B)
        )
        end_B = end_B + 1


@pytest.mark.parametrize(
    ("name", "slots", "share"),
    [
        ("gemma3-270m", 4096, 3 / 18 + 15 / 18 / 8),
        ("gemma3-27b", 32_768, 10 / 62 + 52 / 62 / 32),
        ("mistral-7b", 32_768, 1 / 8),
        ("gemma3-270m", 512, 1.0),
        ("llama3.1-8b", 4096, 1.0),
    ],
)
def test_memory_of_a_cache_is_that_of_its_windows(name, slots, share):
    config = CONFIGS[name]
    shapes = Decoder(config, dtype=jnp.bfloat16).cache_shapes(rows=2, slots=slots)
    held = sum(math.prod(block.shape) for block in jax.tree.leaves(shapes))
    whole = 2 * config.n_layers * 2 * slots * config.n_kv_heads * config.head_dim
    assert held / whole == pytest.approx(share)
