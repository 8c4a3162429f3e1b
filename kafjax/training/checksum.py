"""Checksums of arrays that do not depend on their sharding. A storage format notices a cut file,
but not a flipped bit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kafjax.core.rundir import config_hash


def checksums(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """Sums the words of each array modulo 2^32, each times an odd number derived from its position.

    Integers add up to the same in any order, so devices and processes can each sum their part, on
    any mesh. An odd factor has an inverse, so a change of any one word changes the sum; changes of
    several cancel by chance only, in one case of 2^32.
    """
    return {name: int(value) for name, value in jax.device_get(_checksums(dict(arrays))).items()}


@jax.jit
def _checksums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _checksum(array) for name, array in arrays.items()}


def weights_hash(params: Mapping[str, Any]) -> str:
    """Hashes the values of a tree of weights, whatever their sharding: 12 hex digits. A collective:
    all processes must call it."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return config_hash(checksums({jax.tree_util.keystr(path): leaf for path, leaf in leaves}))


def _checksum(array: jax.Array) -> jax.Array:
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    bits = 8 * array.dtype.itemsize
    # 64 bits give two words each
    words = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{min(bits, 32)}")).astype(
        jnp.uint32
    )
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        stride = math.prod(words.shape[axis + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride)
    place ^= place >> 16  # neighbours' factors should not be neighbours
    return jnp.sum(words * (2 * (place * jnp.uint32(0x9E3779B1)) + 1), dtype=jnp.uint32)
