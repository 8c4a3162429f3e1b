"""Attention of a layer on the devices of a mesh: each has its rows and heads, and computes them by
itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, PartitionSpec

from kafjax.core.errors import UserError
from kafjax.models.caches import KINDS, Cache
from kafjax.models.sight import Sight
from kafjax.ops.attention import Past, attention, limit
from kafjax.ops.ring import ring_attention
from kafjax.parallel.sharding import RULES, Constrain

QUERIES, KEYS = ("batch", "length", "heads", None), ("batch", "length", "kv_heads", None)
"""Logical axes of queries, keys and values."""
_CACHED = ("batch", None, "kv_heads", None)


def attend_on(
    constrain: Constrain,
    q_BxTxHxD: jax.Array,
    k_BxTxKxD: jax.Array,
    v_BxTxKxD: jax.Array,
    *,
    segments_BxT: jax.Array | None,
    past: Past | None,
    sliding: jax.Array | bool,
    **settings: Any,
) -> jax.Array:
    """`ops.attention.attention` of new tokens among themselves and over `past`, `[B, T, H, D]`.

    Where the tokens of a row are split, keys and values go round a ring of devices. Over a cache
    they are gathered; a turn of decoding, whose queries are one a row, is left to the compiler.
    Raises `UserError` where the kernel does not compute this.
    """
    if not constrain.is_split or (past is not None and q_BxTxHxD.shape[1] == 1):
        ids = None if segments_BxT is None else (segments_BxT, segments_BxT)
        return attention(
            *(q_BxTxHxD, k_BxTxKxD, v_BxTxKxD),
            sliding=sliding,
            segments=ids,
            past=past,
            **settings,
        )
    mesh = _split_axes(cast(Mesh, constrain.mesh))
    n_heads, n_kv_heads = q_BxTxHxD.shape[2], k_BxTxKxD.shape[2]
    # each device has its own key head, where there are fewer than devices
    copies = _copies(n_heads, n_kv_heads, mesh.shape.get(cast(str, RULES["heads"]), 1))
    k, v = (jnp.repeat(x, copies, axis=2) if copies > 1 else x for x in (k_BxTxKxD, v_BxTxKxD))
    if past is not None and copies > 1:
        past = Past(*(jnp.repeat(x, copies, axis=2) for x in past[:2]), past.age_BxN)
    keys = KEYS if past is None else _CACHED
    of_q, of_k = (
        _within(mesh, constrain.spec(x.shape, axes))
        for x, axes in ((q_BxTxHxD, QUERIES), (k, keys))
    )
    rows, length = of_q[0], of_q[1]
    traced = None if isinstance(sliding, bool) else sliding

    def on_a_device(q, k, v, segments, past, traced):
        own = sliding if traced is None else traced
        if length is None:
            ids = None if segments is None else (segments, segments)
            return attention(q, k, v, sliding=own, segments=ids, past=past, **settings)
        if settings["kernel"] == "cudnn":
            raise UserError(
                "cuDNN attention does not split the tokens of a row; leave --attention at auto, or sequence out of --mesh"
            )
        if past is None:
            return ring_attention(
                *(q, k, v, segments),
                window=limit(settings["window"], own),
                scale=settings["scale"],
                cap=settings["cap"],
                axis=length,
                n=mesh.shape[length],
            )
        offset = jax.lax.axis_index(length) * q.shape[1]
        return attention(q, k, v, sliding=own, past=past, offset=offset, **settings)

    by_row, by_token = PartitionSpec(rows), PartitionSpec(rows, length)
    return _shard_mapped(
        on_a_device,
        mesh,
        (of_q, of_k, of_k, by_token, Past(*cast(Any, (of_k, of_k, by_row))), PartitionSpec()),
        of_q,
    )(q_BxTxHxD, k, v, segments_BxT, past, traced)


def over_either(
    attend: Callable[..., jax.Array],
    sight: Sight,
    past: Cache,
    number: jax.Array,
    sliding: jax.Array,
    q_BxTxHxD: jax.Array,
    k_BxTxKxD: jax.Array,
    v_BxTxKxD: jax.Array,
    **settings: Any,
) -> jax.Array:
    """`attend` over the cache of layer `number` of its kind, where a scan runs over both kinds."""

    def over(slides: bool) -> Callable[..., jax.Array]:
        def run(*qkv: jax.Array) -> jax.Array:
            of_layer = functools.partial(
                jax.lax.dynamic_index_in_dim, index=number, axis=0, keepdims=False
            )
            kv = jax.tree.map(of_layer, past[KINDS[slides]])
            return attend(*qkv, past=sight.past(kv), sliding=slides, **settings)

        return run

    return jax.lax.cond(sliding, over(True), over(False), q_BxTxHxD, k_BxTxKxD, v_BxTxKxD)


def _copies(n_heads: int, n_kv_heads: int, n_devices: int) -> int:
    """Counts the copies of each key head, so that they divide over the devices that share the query
    heads."""
    if n_heads % n_devices:
        return 1
    return math.lcm(n_kv_heads, n_devices) // n_kv_heads


def _split_axes(mesh: Mesh) -> Mesh:
    """The mesh without the axes that split nothing: over those, too, gradients would be added up."""
    split = {axis: size for axis, size in mesh.shape.items() if size > 1}
    kinds = (AxisType.Auto,) * len(split)
    return Mesh(mesh.devices.reshape(*split.values()), tuple(split), axis_types=kinds)


def _within(mesh: Mesh, spec: PartitionSpec) -> PartitionSpec:
    """The spec with the axes of `mesh` alone."""

    def kept(rule: Any) -> Any:
        if isinstance(rule, tuple):
            return tuple(axis for axis in rule if axis in mesh.shape) or None
        return rule if rule in mesh.shape else None

    return PartitionSpec(*map(kept, spec))


def _shard_mapped(
    function: Callable[..., Any], mesh: Mesh, in_specs: tuple[Any, ...], out_specs: Any
) -> Callable[..., Any]:
    """`jax.shard_map` of a function some of whose arguments may be None."""

    def call(*args: Any) -> Any:
        specs = tuple(
            None if arg is None else spec for arg, spec in zip(args, in_specs, strict=True)
        )
        return jax.shard_map(
            function, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False
        )(*args)

    return call
