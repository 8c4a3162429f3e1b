"""LoRA as pure functions on parameter trees (Hu et al. 2021, arXiv:2106.09685).

A model's parameters stay as they are; an adapter is a flat dict beside them, and the only thing
that trains:

    params                                      adapters = init(Spec(rank=16, targets="q_proj"), params, key)
    ├── embed/embedding        [V, D]
    ├── layers
    │   ├── attn
    │   │   ├── q_proj/kernel  [L, D, H]        "layers/attn/q_proj/kernel": {"a": [L, D, 16], "b": [L, 16, H]}
    │   │   └── k_proj/kernel  [L, D, K]
    │   └── ...
    └── final_norm/scale       [D]

`attach(params, adapters, spec)` gives the tree that the model computes with. Each leaf that is not
adapted is the same array as before, and so is each `base`:

    ├── embed/embedding        [V, D]
    ├── layers
    │   ├── attn
    │   │   ├── q_proj/kernel  LoRAWeight(base=[L, D, H], a=[L, D, 16], b=[L, 16, H] * alpha / rank)
    │   │   └── k_proj/kernel  [L, D, K]
    ...

`spec` may ask for more beside `a` and `b`. DoRA adds "magnitude" [L, H]. A parameter that is
trained in full stands under its path as {"<its name>": array of its shape}, such as
"final_norm/scale": {"scale": [D]}, and replaces the base's in `attach`. Trained rows of the
embedding are "embed/embedding": {"rows": [n, D]}; `attach` represents the table with these rows as
`LoRAWeight(base=[V, D], a=[V, n] of zeros and ones, b=rows - base[ids])`. An adapter of a tied
embedding acts in both places, at the input and at the logits, as it does when merged.

`merge(params, adapters, spec)` gives a tree of the old shapes, with `kernel + alpha / rank * a @ b`
in place of the kernel.

Train with the adapters as their own argument, so that the base is never differentiated:

    grads = jax.grad(lambda adapters: loss(attach(params, adapters, spec), batch))(adapters)

With `Spec(init="pissa")` or "olora" the adapter starts as a part of the kernel, which is subtracted
from the base:

    base = residual(params, adapters, spec)     # attach, merge and drift then take `base`; the same as `params` for other inits
    trained = train(base, adapters)
    adapters, spec = plain(params, trained, adapters, spec)    # at the end: an ordinary adapter for `params`, of twice the rank
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.lora import inits
from kafjax.lora.inits import column_norm
from kafjax.lora.spec import Spec, ranks, scales, token_table, trained
from kafjax.ops.linear import LoRAWeight
from kafjax.ops.quantized import QuantizedKernel, dense

Adapters = dict[str, dict[str, jax.Array]]
"""`{kernel path: {"a": float32 [.., in, rank], "b": float32 [.., rank, out]}}`; `..` is the layer
axis, where there is one.

`rank` is that of the widest layer: see `spec.ranks`. With DoRA also "magnitude" `[.., out]`. A
parameter trained in full is there under its path as `{its name: array}`."""


def abstract(spec: Spec, params: Mapping[str, Any]) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Shapes and dtypes of `init(spec, params, key)`; `params` may be abstract too. Raises
    `UserError` as `init` does.

    For a finished adapter, whose rank may be higher than one that can be trained here, use
    `shapes`.

    >>> base = {"layers": {"attn": {"q_proj": {"kernel": np.ones((2, 4, 3), np.float32)}}}}  # two layers, 4 -> 3
    >>> abstract(Spec(rank=2), base)["layers/attn/q_proj/kernel"]["b"].shape
    (2, 2, 3)
    """
    leaves = trees.flatten(params)
    for path, rank in ranks(spec, params).items():
        if rank.max() > min(leaves[path].shape[-2:]):
            raise UserError(
                f"LoRA rank={rank.max()} is above min(in, out) of '{path}', a kernel {list(leaves[path].shape[-2:])}"
            )
    return shapes(spec, params)


def init(spec: Spec, params: Mapping[str, Any], key: jax.Array) -> Adapters:
    """Draws a fresh adapter. Attached to `residual(params, adapters, spec)` it changes nothing yet.

    Each kernel draws from its own stream, so that adding a target changes no other.

    Args:
      params: the base. Plain LoRA reads only its shapes, so abstract ones will do; DoRA, PiSSA and
        OLoRA read its values.
      key: a PRNG key.

    Raises:
      UserError: no kernel matches, the rank is above min(in, out) of one, or another fault of
        `spec` on this base.

    >>> base = {"layers": {"attn": {"q_proj": {"kernel": np.ones((2, 4, 3), np.float32)}}}}  # two layers, 4 -> 3
    >>> adapters = init(Spec(rank=2), base, jax.random.key(0))
    >>> {name: array.shape for name, array in adapters["layers/attn/q_proj/kernel"].items()}
    {'a': (2, 4, 2), 'b': (2, 2, 3)}
    """
    abstract(spec, params)
    leaves, scale = trees.flatten(params), scales(spec, params)

    def pair(path: str, rank: np.ndarray) -> dict[str, jax.Array]:
        stream = jax.random.fold_in(key, zlib.crc32(path.encode()))
        drawn = inits.of(spec.init, path)(leaves[path], rank, scale[path], stream)
        return drawn | {"magnitude": column_norm(leaves[path])} if spec.dora else drawn

    in_full = {
        path: {_name(path): jnp.array(leaf, jnp.float32)}
        for path, leaf in trained(spec, params).items()
    }
    rows = {
        path: {"rows": leaf[_rows(spec)].astype(jnp.float32)}
        for path, leaf in token_table(spec, params).items()
    }
    return {path: pair(path, rank) for path, rank in ranks(spec, params).items()} | in_full | rows


def residual(params: Mapping[str, Any], initial: Adapters, spec: Spec) -> trees.Tree:
    """Returns the base to train the adapter `initial` beside: `params`, or `kernel - scale * a @ b`
    with PiSSA and OLoRA.

    The difference is computed in float32 and cast once. Raises `UserError` as `attach` does.

    >>> base, spec = {"q_proj": {"kernel": jnp.diag(jnp.array([4.0, 1.0]))}}, Spec(rank=1, alpha=1, init="pissa")
    >>> initial = {"q_proj/kernel": {"a": jnp.array([[2.0], [0.0]]), "b": jnp.array([[2.0, 0.0]])}}  # as `init` draws it
    >>> residual(base, initial, spec)["q_proj"]["kernel"].tolist()
    [[0.0, 0.0], [0.0, 1.0]]
    """
    check_adapters(params, initial, spec)
    flat, scale = trees.flatten(params), scales(spec, params)
    for path in scale if spec.changes_base else ():
        flat[path] = (flat[path].astype(jnp.float32) - _update(initial[path], scale[path])).astype(
            flat[path].dtype
        )
    return trees.unflatten(flat)


def plain(
    params: Mapping[str, Any], trained: Adapters, initial: Adapters, spec: Spec
) -> tuple[Adapters, Spec]:
    """Converts an adapter trained beside the `residual` base into an equivalent one for `params`.
    Returns (adapters, spec).

    `W - a0 b0 + a b = W + [a, a0] [b; -b0]`, so with PiSSA and OLoRA the rank doubles. Any other
    adapter is returned unchanged. Only shapes of `params` are read. Raises `UserError` as `attach`
    does.

    >>> base, spec = {"q_proj": {"kernel": jnp.diag(jnp.array([4.0, 1.0]))}}, Spec(rank=1, alpha=1, init="pissa")
    >>> initial = {"q_proj/kernel": {"a": jnp.array([[2.0], [0.0]]), "b": jnp.array([[2.0, 0.0]])}}
    >>> trained = {"q_proj/kernel": {"a": jnp.array([[2.0], [0.0]]), "b": jnp.array([[3.0, 5.0]])}}
    >>> adapters, ordinary = plain(base, trained, initial, spec)
    >>> ordinary.init, ordinary.rank, merge(base, adapters, ordinary)["q_proj"]["kernel"].tolist()
    ('lora', 2, [[6.0, 10.0], [0.0, 1.0]])
    """
    if not spec.changes_base:
        return trained, spec
    check_adapters(params, trained, spec)
    check_adapters(params, initial, spec)

    def both(path: str, rank: np.ndarray) -> dict[str, jax.Array]:
        now, then, j = trained[path], initial[path], np.arange(2 * rank.max())
        own = rank[..., None]
        # A layer's own 2 * rank columns stand first: its trained ones, its initial ones, then one
        # that is zero (as `ranks` tells).
        order = np.where(j < own, j, np.where(j < 2 * own, rank.max() + j - own, own))
        a, b = (
            jnp.concatenate([now["a"], then["a"]], -1),
            jnp.concatenate([now["b"], -then["b"]], -2),
        )
        return now | {
            "a": jnp.take_along_axis(a, order[..., None, :], -1),
            "b": jnp.take_along_axis(b, order[..., :, None], -2),
        }

    grown = 2**0.5 if spec.rslora else 2  # keeps the scale
    twice = dataclasses.replace(
        spec,
        init="lora",
        rank=2 * spec.rank,
        alpha=grown * spec.alpha,
        rank_pattern={pattern: 2 * rank for pattern, rank in spec.rank_pattern.items()},
        alpha_pattern={pattern: grown * alpha for pattern, alpha in spec.alpha_pattern.items()},
    )
    return trained | {path: both(path, rank) for path, rank in ranks(spec, params).items()}, twice


def check_adapters(params: Mapping[str, Any], adapters: Mapping[str, Any], spec: Spec) -> None:
    """Raises `UserError` naming the first path where `adapters` do not fit `spec` and the base
    `params`.

    >>> base = {"q_proj": {"kernel": np.ones((4, 3), np.float32)}}
    >>> spec = Spec(rank=2, targets="q_proj")
    >>> check_adapters(base, init(spec, base, jax.random.key(0)), spec)
    """
    expected = shapes(spec, params)
    for path in [*expected, *adapters]:
        if path not in adapters:
            raise UserError(
                f"the adapter has nothing for '{path}', which targets={spec.targets!r} asks for"
            )
        if path not in expected:
            raise UserError(
                f"the adapter holds '{path}', which is no target of this base (targets={spec.targets!r})"
            )
        if set(adapters[path]) != set(expected[path]):
            raise UserError(
                f"the adapter holds {sorted(adapters[path])} for '{path}', not {sorted(expected[path])}"
            )
        for name, want in expected[path].items():
            if (have := tuple(adapters[path][name].shape)) != want.shape:
                raise UserError(
                    f"the adapter's '{path}/{name}' has shape {list(have)}, this base with rank={spec.rank} needs {list(want.shape)}; "
                    "was it made for another model?"
                )


def attach(
    params: Mapping[str, Any], adapters: Adapters, spec: Spec, key: jax.Array | None = None
) -> trees.Tree:
    """Returns `params` with a `LoRAWeight` for each adapted kernel, for use inside the loss or a
    forward pass.

    The scale is folded into `b` in float32. Copies no array of the base.

    Args:
      params: the base; with PiSSA and OLoRA the `residual` one.
      key: draws the dropout of this training step. Without it nothing is dropped.

    Raises:
      UserError: base, adapters and spec do not fit together.

    >>> base = {"layers": {"attn": {"q_proj": {"kernel": np.ones((2, 4, 3), np.float32)}}}}  # two layers, 4 -> 3
    >>> spec = Spec(rank=2)
    >>> attached = attach(base, init(spec, base, jax.random.key(0)), spec)
    >>> weight = attached["layers"]["attn"]["q_proj"]["kernel"]
    >>> weight.base is base["layers"]["attn"]["q_proj"]["kernel"], weight.a.shape
    (True, (2, 4, 2))
    """
    check_adapters(params, adapters, spec)
    flat, rank, scale = trees.flatten(params), ranks(spec, params), scales(spec, params)
    for path, parts in adapters.items():
        if path not in rank:
            flat[path] = (
                _with_rows(flat[path], parts["rows"], spec)
                if "rows" in parts
                else parts[_name(path)]
            )
            continue
        base, a, b = flat[path], parts["a"], scaled(parts["b"], scale[path])
        gain = _gain(base, a, b, parts["magnitude"], rank[path]) if spec.dora else None
        drops = spec.dropout and key is not None and path.endswith("/kernel")
        keys = _layer_keys(key, path, rank[path].shape) if drops else None
        flat[path] = LoRAWeight(base, a, b, gain, keys, spec.dropout)
    return trees.unflatten(flat)


def merge(params: Mapping[str, Any], adapters: Adapters, spec: Spec) -> trees.Tree:
    """Returns `params` with `kernel + scale * a @ b` in place of each adapted kernel: added in
    float32, cast once to its dtype.

    With DoRA its columns are scaled to the length `magnitude`. A quantised kernel becomes a float32
    one, so that rounding does not lose the update. `drift` measures the error of the cast. Takes
    the base that `attach` takes, and raises `UserError` as it does.

    >>> base = {"q_proj": {"kernel": jnp.zeros((2, 2))}}
    >>> adapters = {"q_proj/kernel": {"a": jnp.ones((2, 1)), "b": jnp.array([[1.0, 2.0]])}}
    >>> merge(base, adapters, Spec(rank=1, alpha=3))["q_proj"]["kernel"].tolist()
    [[3.0, 6.0], [3.0, 6.0]]
    """
    check_adapters(params, adapters, spec)
    flat = trees.flatten(params)
    return trees.unflatten(
        flat
        | {
            path: _stored(exact, flat[path])
            for path, exact in _merged(flat, params, adapters, spec)
        }
    )


def drift(params: Mapping[str, Any], adapters: Adapters, spec: Spec) -> dict[str, float]:
    """Computes the rounding error of `merge`: `{path: max |exact - cast(exact)|}`, zero for a
    float32 base.

    Compare it with the size of the update: in bfloat16 a small one can vanish. Raises `UserError`
    as `attach` does.

    >>> base = {"q_proj": {"kernel": jnp.ones((2, 2), jnp.bfloat16)}}
    >>> adapters = {"q_proj/kernel": {"a": jnp.ones((2, 1)), "b": jnp.full((1, 2), 2.0**-9)}}
    >>> drift(base, adapters, Spec(rank=1, alpha=1)) == {"q_proj/kernel": 2.0**-9}  # all of the update is lost
    True
    """
    check_adapters(params, adapters, spec)
    flat = trees.flatten(params)

    def lost(path: str, exact: jax.Array) -> float:
        return float(jnp.max(jnp.abs(exact - _stored(exact, flat[path]).astype(jnp.float32))))

    return {path: lost(path, exact) for path, exact in _merged(flat, params, adapters, spec)}


def _stored(exact: jax.Array, base: Any) -> jax.Array:
    return exact if isinstance(base, QuantizedKernel) else exact.astype(base.dtype)


def axes(
    adapters: Mapping[str, Any], model_axes: Mapping[str, Any]
) -> dict[str, dict[str, tuple[str | None, ...]]]:
    """Logical axes of an adapter, inherited from its kernels (`model.axes()`): `a` has the input
    axis, `b` the output axis.

    >>> axes({"q_proj/kernel": {"a": ..., "b": ...}}, {"q_proj": {"kernel": ("embed", "heads")}})
    {'q_proj/kernel': {'a': ('embed', None), 'b': (None, 'heads')}}
    """
    flat = trees.flatten(model_axes)

    def part(path: str, name: str) -> tuple[str | None, ...]:
        *stacked, n_in, n_out = flat[path]
        return {
            "a": (*stacked, n_in, None),
            "b": (*stacked, None, n_out),
            "magnitude": (*stacked, n_out),
            "rows": (None, n_out),
        }[name]

    return {
        path: {name: flat[path] if name == _name(path) else part(path, name) for name in parts}
        for path, parts in adapters.items()
    }


def _name(path: str) -> str:
    return path.split("/")[-1]


def shapes(spec: Spec, params: Mapping[str, Any]) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Shapes and dtypes of any adapter of `spec`, whatever its rank; `params` may be abstract too.

    Raises `UserError` for a fault of `spec` on this base.

    >>> base = {"layers": {"attn": {"q_proj": {"kernel": np.ones((2, 4, 3), np.float32)}}}}  # two layers, 4 -> 3
    >>> shapes(Spec(rank=6), base)["layers/attn/q_proj/kernel"]["a"].shape  # above min(4, 3), as a sum of adapters may be
    (2, 4, 6)
    """
    leaves = trees.flatten(params)

    def parts(path: str, width: int) -> dict[str, jax.ShapeDtypeStruct]:
        *stacked, n_in, n_out = leaves[path].shape
        shapes = {"a": (*stacked, n_in, width), "b": (*stacked, width, n_out)}
        shapes |= {"magnitude": (*stacked, n_out)} if spec.dora else {}
        return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    in_full = {
        path: {_name(path): jax.ShapeDtypeStruct(leaf.shape, jnp.float32)}
        for path, leaf in trained(spec, params).items()
    }
    n = len(spec.token_rows)
    rows = {
        p: {"rows": jax.ShapeDtypeStruct((n, leaf.shape[-1]), jnp.float32)}
        for p, leaf in token_table(spec, params).items()
    }
    return (
        {path: parts(path, int(rank.max())) for path, rank in ranks(spec, params).items()}
        | in_full
        | rows
    )


def _rows(spec: Spec) -> np.ndarray:
    return np.array(spec.token_rows)


def _with_rows(base: jax.Array, rows: jax.Array, spec: Spec) -> LoRAWeight:
    """`base [V, D]` with other rows: their difference is an adapter whose `a` tells which they
    are."""
    ids = _rows(spec)
    a = jnp.zeros((base.shape[0], len(ids)), jnp.float32).at[ids, np.arange(len(ids))].set(1)
    return LoRAWeight(base, a, rows.astype(jnp.float32) - base[ids].astype(jnp.float32))


def scaled(b: jax.Array, scale: Any) -> jax.Array:
    """Multiplies `b [.., rank, out]` with its scale `[..]`, in float32."""
    return b.astype(jnp.float32) * scale[..., None, None]


def _update(parts: Mapping[str, jax.Array], scale: np.ndarray) -> jax.Array:
    return jnp.matmul(
        parts["a"].astype(jnp.float32),
        scaled(parts["b"], scale),
        precision=jax.lax.Precision.HIGHEST,
    )


def _merged(flat: Mapping[str, Any], params: Mapping[str, Any], adapters: Adapters, spec: Spec):
    """Yields `(path, float32 array)` for each parameter that the adapters change."""
    rank, scale = ranks(spec, params), scales(spec, params)
    for path, parts in adapters.items():
        if path not in rank:
            whole = (
                flat[path].astype(jnp.float32).at[_rows(spec)].set(parts["rows"])
                if "rows" in parts
                else parts[_name(path)]
            )
            yield path, whole.astype(jnp.float32)
            continue
        exact = dense(flat[path]) + _update(parts, scale[path])
        if spec.dora:
            gain = jnp.where(
                (rank[path] > 0)[..., None], _per_norm(parts["magnitude"], column_norm(exact)), 1
            )
            exact = exact * gain[..., None, :]
        yield path, exact


def _gain(
    base: jax.Array, a: jax.Array, b: jax.Array, magnitude: jax.Array, rank: np.ndarray
) -> jax.Array:
    """DoRA's factor of each output, `magnitude / |W + a @ b|`: float32 `[.., out]`, 1 in layers
    without an adapter.

    The square of the norm is `|W|^2 + 2 <W, a b> + |a b|^2`, column by column: no array is larger
    than `[rank, out]`. The norm counts as a constant in the gradient (Liu et al. 2024, section
    4.3).
    """

    def product(subscripts: str, *xs: jax.Array) -> jax.Array:
        return jnp.einsum(subscripts, *xs, preferred_element_type=jnp.float32)

    # In the dtype of the base: one cast up would be a copy of it.
    a, b = jax.lax.stop_gradient(a).astype(base.dtype), jax.lax.stop_gradient(b)
    crossed = 2 * product("...ir,...io->...ro", a, base) + product(
        "...rk,...ko->...ro", product("...ir,...ik->...rk", a, a), b
    )
    square = product("...io,...io->...o", base, base) + jnp.sum(b * crossed, axis=-2)
    return jnp.where(
        (rank > 0)[..., None], _per_norm(magnitude, jnp.sqrt(jnp.maximum(square, 0))), 1
    )


def _per_norm(magnitude: jax.Array, norm: jax.Array) -> jax.Array:
    """`magnitude / norm`, and 0 where the norm is 0: a column of zeros has no direction to scale,
    so its output stays 0."""
    return jnp.where(norm > 0, magnitude / jnp.where(norm > 0, norm, 1), 0)


def _layer_keys(key: jax.Array, path: str, stacked: tuple[int, ...]) -> jax.Array:
    stream = jax.random.fold_in(key, zlib.crc32(path.encode()))
    return jax.random.split(stream, stacked) if stacked else stream
