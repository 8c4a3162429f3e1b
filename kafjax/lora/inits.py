"""How `a`, `b` and DoRA's magnitude start: kernel by kernel, `W [.., in, out]`, ranks and scales layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Pair = dict[str, jax.Array]


def uniform(kernel: Any, rank: np.ndarray, scale: np.ndarray, key: jax.Array) -> Pair:
    """`a ~ U(-1/sqrt(in), 1/sqrt(in))`, PEFT's default (Kaiming uniform with slope sqrt(5)), and `b` zero. Reads only shapes."""
    *stacked, n_in, n_out = kernel.shape
    bound, width = n_in**-0.5, int(rank.max())
    a = jax.random.uniform(key, (*stacked, n_in, width), jnp.float32, -bound, bound)
    return {"a": jnp.where(_own(rank)[..., None, :], a, 0), "b": jnp.zeros((*stacked, width, n_out), jnp.float32)}


def table(embedding: Any, rank: np.ndarray, scale: np.ndarray, key: jax.Array) -> Pair:
    """Of a table `[V, D]` `a` is zero and `b ~ N(0, 1)`, as PEFT draws them beside an embedding. Reads only shapes."""
    V, D = embedding.shape
    return {"a": jnp.zeros((V, int(rank)), jnp.float32), "b": jax.random.normal(key, (int(rank), D), jnp.float32)}


def head(embedding: Any, rank: np.ndarray, scale: np.ndarray, key: jax.Array) -> Pair:
    """Of a head `[V, D]`, which is a transposed kernel, `b` is drawn as the `a` of a kernel, and `a` is zero. Reads only shapes."""
    V, D = embedding.shape
    drawn = uniform(jax.ShapeDtypeStruct((D, V), jnp.float32), rank, scale, key)
    return {"a": drawn["b"].T, "b": drawn["a"].T}


def pissa(kernel: jax.Array, rank: np.ndarray, scale: np.ndarray, key: jax.Array) -> Pair:
    """`scale * a @ b` is the kernel at its `rank` largest singular values, shared evenly between both (Meng et al. 2024, equation 2)."""

    def of_layer(w: jax.Array, scale: jax.Array) -> Pair:
        u, s, vt = jnp.linalg.svd(w, full_matrices=False)
        root = jnp.sqrt(s / scale)
        return {"a": u * root, "b": root[:, None] * vt}

    return _of_layers(of_layer, kernel, rank, scale)


def olora(kernel: jax.Array, rank: np.ndarray, scale: np.ndarray, key: jax.Array) -> Pair:
    """`a @ b` is the first `rank` terms of the QR decomposition of the transposed kernel (Büyükakyüz 2024, algorithm 1)."""

    def of_layer(w: jax.Array, scale: jax.Array) -> Pair:
        q, r = jnp.linalg.qr(w.T)
        return {"a": r.T, "b": q.T}

    return _of_layers(of_layer, kernel, rank, scale)


def of(name: str, path: str) -> Callable[..., Pair]:
    """How the adapter of the parameter `path` starts with `Spec(init=name)`."""
    plain = {"embedding": head if path.startswith("head/") else table}.get(path.split("/")[-1], uniform)
    return {"lora": plain, "pissa": pissa, "olora": olora}[name]


def column_norm(kernel: jax.Array) -> jax.Array:
    """Euclidean norm of each column of `W [.., in, out]`: float32 `[.., out]`."""
    return jnp.linalg.norm(kernel.astype(jnp.float32), axis=-2)


def _of_layers(of_layer: Callable[[jax.Array, jax.Array], Pair], kernel: jax.Array, rank: np.ndarray, scale: np.ndarray) -> Pair:
    """`of_layer(w [in, out], scale)` for one layer after another, cut to the widest rank; zero beyond a layer's own."""
    width, own = int(rank.max()), _own(rank)
    safe = np.where(rank > 0, scale, 1).astype(np.float32)

    def cut(args: tuple[jax.Array, jax.Array]) -> Pair:
        pair = of_layer(args[0].astype(jnp.float32), args[1])
        return {"a": pair["a"][:, :width], "b": pair["b"][:width]}

    pair = cut((kernel, safe)) if kernel.ndim == 2 else jax.lax.map(cut, (kernel, jnp.asarray(safe)))
    return {"a": jnp.where(own[..., None, :], pair["a"], 0), "b": jnp.where(own[..., :, None], pair["b"], 0)}


def _own(rank: np.ndarray) -> np.ndarray:
    """True `[.., width]` where a column of `a` belongs to its layer's own rank."""
    return np.arange(rank.max()) < rank[..., None]
