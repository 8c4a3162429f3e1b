"""LoRA as pure functions on parameter trees (Hu et al. 2021, arXiv:2106.09685).

A model's parameters stay as they are; an adapter is a flat dict beside them, and the only thing that trains:

    params                                      adapters = init(Spec(rank=16, targets="q_proj"), params, key)
    ├── embed/embedding        [V, D]
    ├── layers
    │   ├── attn
    │   │   ├── q_proj/kernel  [L, D, H]        "layers/attn/q_proj/kernel": {"a": [L, D, 16], "b": [L, 16, H]}
    │   │   └── k_proj/kernel  [L, D, K]
    │   └── ...
    └── final_norm/scale       [D]

`attach(params, adapters, spec)` gives the tree that the model computes with. Each leaf that is not adapted is the same array as
before, and so is each `base`:

    ├── embed/embedding        [V, D]
    ├── layers
    │   ├── attn
    │   │   ├── q_proj/kernel  LoRAWeight(base=[L, D, H], a=[L, D, 16], b=[L, 16, H] * alpha / rank)
    │   │   └── k_proj/kernel  [L, D, K]
    ...

`merge(params, adapters, spec)` gives a tree of the old shapes, with `kernel + alpha / rank * a @ b` in place of the kernel.

Train with the adapters as their own argument, so that the base is never differentiated:

    grads = jax.grad(lambda adapters: loss(attach(params, adapters, spec), batch))(adapters)
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.lora.spec import Spec, targeted
from kafjax.ops.linear import LoRAWeight

Adapters = dict[str, dict[str, jax.Array]]
"""`{kernel path: {"a": float32 [.., in, rank], "b": float32 [.., rank, out]}}`; `..` is the layer axis, where there is one."""


def abstract(spec: Spec, params: Mapping[str, Any]) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Shapes and dtypes of `init(spec, params, key)`; `params` may be abstract too. Raises `UserError` as `init` does."""

    def pair(kernel: Any) -> dict[str, jax.ShapeDtypeStruct]:
        *stacked, n_in, n_out = kernel.shape
        return {
            "a": jax.ShapeDtypeStruct((*stacked, n_in, spec.rank), jnp.float32),
            "b": jax.ShapeDtypeStruct((*stacked, spec.rank, n_out), jnp.float32),
        }

    return {path: pair(kernel) for path, kernel in targeted(spec, params).items()}


def init(spec: Spec, params: Mapping[str, Any], key: jax.Array) -> Adapters:
    """A fresh adapter, which changes nothing yet: `b` is zero.

    `a ~ U(-1/sqrt(in), 1/sqrt(in))`, which is PEFT's default (Kaiming uniform with slope sqrt(5)). Each kernel draws from its own
    stream, so that adding a target changes no other.

    Args:
      params: the base; only shapes are read, so abstract ones will do.
      key: a PRNG key.

    Raises:
      UserError: no kernel matches, or the rank is above min(in, out) of one.
    """

    def pair(path: str, shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        a, b = shapes["a"], shapes["b"]
        bound = a.shape[-2] ** -0.5
        stream = jax.random.fold_in(key, zlib.crc32(path.encode()))
        return {"a": jax.random.uniform(stream, a.shape, a.dtype, -bound, bound), "b": jnp.zeros(b.shape, b.dtype)}

    return {path: pair(path, shapes) for path, shapes in abstract(spec, params).items()}


def check(params: Mapping[str, Any], adapters: Mapping[str, Any], spec: Spec) -> None:
    """Raises `UserError` naming the first path where `adapters` are not what `spec` makes for the base `params`."""
    expected = abstract(spec, params)
    for path in [*expected, *adapters]:
        if path not in adapters:
            raise UserError(f"the adapter has nothing for '{path}', which targets={spec.targets!r} asks for")
        if path not in expected:
            raise UserError(f"the adapter holds '{path}', which is no target of this base (targets={spec.targets!r})")
        if set(adapters[path]) != {"a", "b"}:
            raise UserError(f"the adapter holds {sorted(adapters[path])} for '{path}', not 'a' and 'b'")
        for name, want in expected[path].items():
            if (have := tuple(adapters[path][name].shape)) != want.shape:
                raise UserError(
                    f"the adapter's '{path}/{name}' has shape {list(have)}, this base with rank={spec.rank} needs {list(want.shape)}; "
                    "was it made for another model?"
                )


def attach(params: Mapping[str, Any], adapters: Adapters, spec: Spec) -> trees.Tree:
    """`params` with a `LoRAWeight` for each adapted kernel, for use inside the loss or a forward pass.

    The scale is folded into `b` in float32. Copies no array of the base. Raises `UserError` where base, adapters and
    spec do not fit together.
    """
    check(params, adapters, spec)
    flat = trees.flatten(params)
    for path, pair in adapters.items():
        flat[path] = LoRAWeight(flat[path], pair["a"], _scaled(pair["b"], spec))
    return trees.unflatten(flat)


def merge(params: Mapping[str, Any], adapters: Adapters, spec: Spec) -> trees.Tree:
    """`params` with `kernel + alpha / rank * a @ b` in place of each adapted kernel: added in float32, cast once to its dtype.

    `drift` says what the cast costs. Raises `UserError` as `attach` does.
    """
    check(params, adapters, spec)
    flat = trees.flatten(params)
    for path, pair in adapters.items():
        flat[path] = _sum(flat[path], pair, spec).astype(flat[path].dtype)
    return trees.unflatten(flat)


def drift(params: Mapping[str, Any], adapters: Adapters, spec: Spec) -> dict[str, float]:
    """What `merge` loses to rounding: `{path: max |W + BA - cast(W + BA)|}`, zero for a float32 base.

    Compare it with the size of the update: in bfloat16 a small one can vanish. Raises `UserError` as `attach` does.
    """
    check(params, adapters, spec)
    flat = trees.flatten(params)

    def lost(path: str, pair: dict[str, jax.Array]) -> float:
        exact = _sum(flat[path], pair, spec)
        return float(jnp.max(jnp.abs(exact - exact.astype(flat[path].dtype).astype(jnp.float32))))

    return {path: lost(path, pair) for path, pair in adapters.items()}


def axes(adapters: Mapping[str, Any], model_axes: Mapping[str, Any]) -> dict[str, dict[str, tuple[str | None, ...]]]:
    """Logical axes of an adapter, inherited from its kernels (`model.axes()`): `a` has the input axis, `b` the output axis."""
    flat = trees.flatten(model_axes)

    def pair(path: str) -> dict[str, tuple[str | None, ...]]:
        *stacked, n_in, n_out = flat[path]
        return {"a": (*stacked, n_in, None), "b": (*stacked, None, n_out)}

    return {path: pair(path) for path in adapters}


def _scaled(b: jax.Array, spec: Spec) -> jax.Array:
    return b.astype(jnp.float32) * jnp.float32(spec.scale)


def _sum(kernel: jax.Array, pair: dict[str, jax.Array], spec: Spec) -> jax.Array:
    update = jnp.matmul(pair["a"].astype(jnp.float32), _scaled(pair["b"], spec), precision=jax.lax.Precision.HIGHEST)
    return kernel.astype(jnp.float32) + update
