"""The pieces both families declare with Flax NNX. Each parameter carries the names of its logical
axes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from kafjax.ops.linear import linear, lookup
from kafjax.ops.norms import layer_norm, rms_norm


def parameter(
    key: jax.Array, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float
) -> nnx.Param:
    """A float32 parameter drawn from N(0, std^2), with one logical axis name per dimension."""
    return nnx.Param(std * jax.random.normal(key, shape, jnp.float32), axes=axes)


class Projection(nnx.Module):
    """`x @ kernel (+ bias)`, kernel `[in, out]`; the kernel may be a `LoRAWeight`."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        axes: tuple[str | None, str | None],
        *,
        bias: bool = False,
        rngs: nnx.Rngs,
    ):
        self.kernel = parameter(rngs.params(), (n_in, n_out), axes, n_in**-0.5)
        self.bias = nnx.Param(jnp.zeros((n_out,), jnp.float32), axes=(axes[1],)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = linear(x, self.kernel.get_value())
        return y if self.bias is None else y + self.bias.get_value().astype(x.dtype)


class RMSNorm(nnx.Module):
    """Starts out multiplying by one: `offset + scale`."""

    def __init__(self, size: int, eps: float, offset: float, axis: str | None = "embed"):
        self.scale = nnx.Param(jnp.full((size,), 1.0 - offset, jnp.float32), axes=(axis,))
        self.eps, self.offset = eps, offset

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale.get_value(), self.eps, self.offset)


class Scale(nnx.Module):
    """`x * scale`, one number, which does not train: in torch it is a buffer."""

    def __init__(self):
        self.scale = nnx.Param(jnp.ones((1,), jnp.float32), axes=(None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * jax.lax.stop_gradient(self.scale.get_value()).astype(x.dtype)


class LayerNorm(nnx.Module):
    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones((size,), jnp.float32), axes=("embed",))
        self.bias = nnx.Param(jnp.zeros((size,), jnp.float32), axes=("embed",))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return layer_norm(x, self.scale.get_value(), self.bias.get_value(), self.eps)


class Embedding(nnx.Module):
    """A table `[rows, hidden]`, looked up by id; it may be a `LoRAWeight`."""

    def __init__(self, rows: int, size: int, axes: tuple[str | None, str], *, rngs: nnx.Rngs):
        self.embedding = parameter(rngs.params(), (rows, size), axes, size**-0.5)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return lookup(self.embedding.get_value(), ids)
