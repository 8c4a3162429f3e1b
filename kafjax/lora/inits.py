"""Initial values of `a`, `b` and DoRA's magnitude: kernel by kernel, `W [.., in, out]`, ranks and
scales layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Pair = dict[str, jax.Array]


def uniform(kernel: Any, rank: np.ndarray, scale: np.ndarray, key: jax.Array) -> Pair:
    """`a ~ U(-1/sqrt(in), 1/sqrt(in))`, PEFT's default (Kaiming uniform with slope sqrt(5)), and
    `b` zero. Reads only shapes."""
    *stacked, n_in, n_out = kernel.shape
    bound, width = n_in**-0.5, int(rank.max())
    a = jax.random.uniform(key, (*stacked, n_in, width), jnp.float32, -bound, bound)
    return {
        "a": jnp.where(_own(rank)[..., None, :], a, 0),
        "b": jnp.zeros((*stacked, width, n_out), jnp.float32),
    }


def table(embedding: Any, rank: np.ndarray, scale: np.ndarray, key: jax.Array) -> Pair:
    """Initialises the adapter of an embedding table `[V, D]` as PEFT does: `a` zero and `b ~ N(0,
    1)`. Reads only shapes."""
    V, D = embedding.shape
    return {
        "a": jnp.zeros((V, int(rank)), jnp.float32),
        "b": jax.random.normal(key, (int(rank), D), jnp.float32),
    }


def head(embedding: Any, rank: np.ndarray, scale: np.ndarray, key: jax.Array) -> Pair:
    """Initialises the adapter of a head `[V, D]`, a transposed kernel: `b` drawn as a kernel's `a`,
    `a` zero. Reads only shapes."""
    V, D = embedding.shape
    drawn = uniform(jax.ShapeDtypeStruct((D, V), jnp.float32), rank, scale, key)
    return {"a": drawn["b"].T, "b": drawn["a"].T}


def pissa(kernel: jax.Array, rank: np.ndarray, scale: np.ndarray, key: jax.Array) -> Pair:
    """`scale * a @ b` is the kernel at its `rank` largest singular values, shared evenly between
    both (Meng et al. 2024, equation 2)."""

    def of_layer(w: jax.Array, scale: jax.Array, key: jax.Array, width: int) -> Pair:
        u, s, vt = _leading_svd(w, width, key)
        root = jnp.sqrt(s / scale)
        return {"a": u * root, "b": root[:, None] * vt}

    return _of_layers(of_layer, kernel, rank, scale, key)


def olora(kernel: jax.Array, rank: np.ndarray, scale: np.ndarray, key: jax.Array) -> Pair:
    """`a @ b` is the first `rank` terms of the QR decomposition of the transposed kernel
    (Büyükakyüz 2024, algorithm 1)."""

    def of_layer(w: jax.Array, scale: jax.Array, key: jax.Array, width: int) -> Pair:
        # the first columns of the whole `q`, which depend on no others
        q = jnp.linalg.qr(w[:width].T)[0]
        return {"a": _exact(w, q), "b": q.T}

    return _of_layers(of_layer, kernel, rank, scale, key)


def _exact(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def _leading_svd(
    w: jax.Array, width: int, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The `width` largest singular values of `w [in, out]` with their vectors, by subspace
    iteration in twice as many dimensions.

    Halko et al. 2011 (arXiv:0909.4061), algorithm 4.4, as in the paper of PiSSA. Its few thin
    products take a tenth of the time of all singular values of a [640, 2048] kernel. Exact where `2
    * width` is at least the smaller side. The rest stays in the base.
    """
    y = _exact(w, jax.random.normal(key, (w.shape[1], min(2 * width, *w.shape)), w.dtype))
    for _ in range(4):
        y = _exact(w, jnp.linalg.qr(_exact(w.T, jnp.linalg.qr(y)[0]))[0])
    q = jnp.linalg.qr(y)[0]
    u, s, vt = jnp.linalg.svd(_exact(q.T, w), full_matrices=False)
    return _exact(q, u[:, :width]), s[:width], vt[:width]


def of(name: str, path: str) -> Callable[..., Pair]:
    """Returns the initialiser of the parameter `path` for `Spec(init=name)`."""
    plain = {"embedding": head if path.startswith("head/") else table}.get(
        path.split("/")[-1], uniform
    )
    return {"lora": plain, "pissa": pissa, "olora": olora}[name]


def column_norm(kernel: jax.Array) -> jax.Array:
    """Euclidean norm of each column of `W [.., in, out]`: float32 `[.., out]`."""
    return jnp.linalg.norm(kernel.astype(jnp.float32), axis=-2)


def _of_layers(
    of_layer: Callable[..., Pair],
    kernel: jax.Array,
    rank: np.ndarray,
    scale: np.ndarray,
    key: jax.Array,
) -> Pair:
    """`of_layer(w [in, out], scale, key, width)` for one layer after another, at the widest rank;
    zero beyond a layer's own."""
    width, own = int(rank.max()), _own(rank)
    safe = jnp.asarray(np.where(rank > 0, scale, 1), jnp.float32)

    def one(args: tuple[jax.Array, jax.Array, jax.Array]) -> Pair:
        w, scale, key = args
        return of_layer(w.astype(jnp.float32), scale, key, width)

    pair = (
        one((kernel, safe, key))
        if kernel.ndim == 2
        else jax.lax.map(one, (kernel, safe, jax.random.split(key, rank.shape)))
    )
    return {
        "a": jnp.where(own[..., None, :], pair["a"], 0),
        "b": jnp.where(own[..., :, None], pair["b"], 0),
    }


def _own(rank: np.ndarray) -> np.ndarray:
    """True `[.., width]` where a column of `a` belongs to its layer's own rank."""
    return np.arange(rank.max()) < rank[..., None]
