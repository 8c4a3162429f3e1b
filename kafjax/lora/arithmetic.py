"""Adapters as vectors: their updates added, subtracted and weighted without rounding, and brought
to a smaller rank.

An update is `scale * a @ b`, so a sum of updates is one of concatenated factors, of the sum of the
ranks:

    w1 s1 a1 b1 + w2 s2 a2 b2 = [a1, a2] [w1 s1 b1; w2 s2 b2]

`compress` takes the best update of a smaller rank from there. Nothing here is larger than the
factors: no kernel-shaped array.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.lora.spec import Spec, explicit, ranks, refuse_extras, scales
from kafjax.lora.transform import Adapters, check_adapters

Factors = dict[str, list[tuple[np.ndarray, np.ndarray]]]
"""`{kernel path: [(a [in, r], scale * b [r, out]) of each layer]}`, float64, r the layer's own
rank."""


def weighted_sum(
    params: Mapping[str, Any], terms: Sequence[tuple[Adapters, Spec, float]]
) -> tuple[Adapters, Spec]:
    """One adapter whose update is `sum of weight * update` over `terms` of `(adapters, spec,
    weight)`; `-1` subtracts.

    Ranks add up, kernel by kernel and layer by layer; weights and scales go into `b`, whose scale
    is then 1.

    Args:
      params: the base; only shapes are read.

    Raises:
      UserError: no terms, a weight that is not finite, adapters of another base, or one whose
        effect is no sum with the kernel.

    >>> base = {"q_proj": {"kernel": np.zeros((2, 2), np.float32)}}
    >>> spec = Spec(rank=1, alpha=1)
    >>> adapters = {"q_proj/kernel": {"a": np.ones((2, 1), np.float32), "b": np.ones((1, 2), np.float32)}}
    >>> summed, sum_spec = weighted_sum(base, [(adapters, spec, 0.5), (adapters, spec, 2.0)])
    >>> (summed["q_proj/kernel"]["a"] @ summed["q_proj/kernel"]["b"]).tolist(), sum_spec.rank
    ([[2.5, 2.5], [2.5, 2.5]], 2)
    """
    if not terms:
        raise UserError("there is nothing to add: no adapters are given")
    summed: Factors = {}
    for adapters, spec, weight in terms:
        if not math.isfinite(weight):
            raise UserError(f"an adapter cannot be weighted with {weight}")
        for path, layers in _factors(params, adapters, spec).items():
            weighted = [(a, weight * b) for a, b in layers]
            summed[path] = (
                [_joined(*pair) for pair in zip(summed[path], weighted, strict=True)]
                if path in summed
                else weighted
            )
    return _adapter(params, summed)


def compress(
    params: Mapping[str, Any], adapters: Adapters, spec: Spec, rank: int
) -> tuple[Adapters, Spec]:
    """The adapter of rank `rank` whose update is nearest to this one's (Eckart & Young 1936), in
    each layer of each kernel.

    The singular values of `a @ b` are those of `Ra Rb^T`, from the QR decompositions of `a` and of
    `b^T`. A layer of a smaller rank keeps its own.

    Raises:
      UserError: a rank below 1, adapters of another base, or one whose effect is no sum with the
        kernel.

    >>> base = {"q_proj": {"kernel": np.zeros((2, 2), np.float32)}}
    >>> spec = Spec(rank=1, alpha=1)
    >>> adapters = {"q_proj/kernel": {"a": np.ones((2, 1), np.float32), "b": np.ones((1, 2), np.float32)}}
    >>> twice, twice_spec = weighted_sum(base, [(adapters, spec, 1.0), (adapters, spec, 1.0)])
    >>> small, small_spec = compress(base, twice, twice_spec, rank=1)
    >>> small_spec.rank, np.allclose(small["q_proj/kernel"]["a"] @ small["q_proj/kernel"]["b"], 2)
    (1, True)
    """
    if rank < 1:
        raise UserError(f"an adapter cannot be brought to rank {rank}: must be 1 or more")

    def nearest(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        (q_a, r_a), (q_b, r_b) = np.linalg.qr(a), np.linalg.qr(b.T)
        u, s, vt = np.linalg.svd(r_a @ r_b.T)
        n = min(rank, a.shape[1], *a.shape[:1], *b.shape[1:])
        root = np.sqrt(s[:n])
        return q_a @ (u[:, :n] * root), (root[:, None] * vt[:n]) @ q_b.T

    factors = _factors(params, adapters, spec)
    return _adapter(
        params,
        {
            path: [nearest(a, b) if a.size else (a, b) for a, b in layers]
            for path, layers in factors.items()
        },
    )


_NO_SUM = {
    "dora": "the length of its columns is no sum",
    "init": "it stands beside another base; make it an ordinary one with lora.plain",
    "trained": "parameters trained in full are no update of a low rank",
    "token_rows": "rows trained in full are no update of a low rank",
}


def _factors(params: Mapping[str, Any], adapters: Adapters, spec: Spec) -> Factors:
    refuse_extras(spec, _NO_SUM, "an adapter with {setting} cannot be added or compressed: {why}")
    check_adapters(params, adapters, spec)
    rank, scale = ranks(spec, params), scales(spec, params)

    def of_kernel(path: str) -> list[tuple[np.ndarray, np.ndarray]]:
        stacked = {
            name: np.asarray(part, np.float64).reshape(-1, *part.shape[-2:])
            for name, part in adapters[path].items()
        }
        own = zip(stacked["a"], stacked["b"], rank[path].flat, scale[path].flat, strict=True)
        return [(a[:, :r], s * b[:r]) for a, b, r, s in own]

    return {path: of_kernel(path) for path in rank}


def _joined(
    one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([one[0], other[0]], 1), np.concatenate([one[1], other[1]], 0)


def _adapter(params: Mapping[str, Any], factors: Factors) -> tuple[Adapters, Spec]:
    """The inverse of `_factors`, with a scale of 1 everywhere."""
    leaves = trees.flatten(params)
    rank = {
        path: np.array([a.shape[1] for a, _ in layers]).reshape(leaves[path].shape[:-2])
        for path, layers in factors.items()
    }

    def stacked(path: str, part: int) -> jnp.ndarray:
        """Factors of all layers in one array, those of a smaller rank filled up with zeros."""
        width, axis = rank[path].max(), 1 - part

        def room(x: np.ndarray) -> list[tuple[int, int]]:
            return [(0, width - n) if i == axis else (0, 0) for i, n in enumerate(x.shape)]

        layers = np.stack([np.pad(pair[part], room(pair[part])) for pair in factors[path]]).astype(
            np.float32
        )
        return jax.device_put(layers.reshape(*rank[path].shape, *layers.shape[1:]))

    usual = int(
        np.bincount(np.concatenate([own[own > 0] for own in map(np.ravel, rank.values())])).argmax()
    )
    alphas = {path: own.astype(float) for path, own in rank.items()}
    spec = explicit(rank, alphas, rank=usual, alpha=float(usual))
    return {path: {"a": stacked(path, 0), "b": stacked(path, 1)} for path in factors}, spec
