"""`linear`: the matrix product with a plain kernel or one with a LoRA adapter beside it. `lookup`
does the same for tables."""

from __future__ import annotations

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp

from kafjax.ops.quantized import QuantizedKernel, dequantize


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoRAWeight:
    """A frozen kernel `base [.., in, out]` with its adapter `a [.., in, rank]`, `b [.., rank,
    out]`.

    The scale is already folded into `b`. It takes the place of a kernel or an embedding table in
    the parameter tree, and only `linear`, `lookup` and `factors` accept it. It defines no array
    conversion, so that computing `base + a @ b` by accident raises.

    Attributes:
      gain: `[.., out]`, DoRA's factor of each output: magnitude over column norm. None without
        DoRA.
      key: `[..]`, draws the dropout of the adapter's input, one key a layer. None where nothing is
        dropped.
      dropout: share of the adapter's inputs that are dropped under `key`.
    """

    base: jax.Array | QuantizedKernel  # tables are never quantised
    a: jax.Array
    b: jax.Array
    gain: jax.Array | None = None
    key: jax.Array | None = None
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdapterSlots:
    """A frozen kernel `base [.., in, out]` with N adapters beside it, `a [.., N, in, rank]`, `b
    [.., N, rank, out]`, scales folded in.

    Row i of a batch of B uses adapter `rows[i]`, `rows [.., B]` int32 (S-LoRA, Sheng et al. 2023,
    arXiv:2311.03285).
    """

    base: jax.Array | QuantizedKernel
    a: jax.Array
    b: jax.Array
    rows: jax.Array


def linear(
    x: jax.Array, kernel: jax.Array | QuantizedKernel | LoRAWeight | AdapterSlots
) -> jax.Array:
    """`x [.., in] @ kernel [in, out]`, in the dtype of `x`, accumulated in float32.

    With a `LoRAWeight` it is `x @ base + (x @ a) @ b` (Hu et al. 2021, equation 3), without an
    array of the base's size. DoRA's gain multiplies that; dropout is applied to the `x` of the
    second term. With `AdapterSlots`, `x [B, T, in]`, each row has its own `a` and `b`; the product
    with the base is one for all of them.
    """
    if isinstance(kernel, AdapterSlots):
        a_BxIxR, b_BxRxO = (
            kernel.a[kernel.rows].astype(x.dtype),
            kernel.b[kernel.rows].astype(x.dtype),
        )
        return base_dot(x, kernel.base) + jax.vmap(low_rank_dot)(x, a_BxIxR, b_BxRxO)
    if not isinstance(kernel, LoRAWeight):
        return base_dot(x, kernel)
    beside = x if kernel.key is None else _dropped(x, kernel.key, kernel.dropout)
    y = base_dot(x, kernel.base) + low_rank_dot(
        beside, kernel.a.astype(x.dtype), kernel.b.astype(x.dtype)
    )
    return y if kernel.gain is None else y * kernel.gain.astype(x.dtype)


def dtype_of(kernel: jax.Array | LoRAWeight) -> jnp.dtype:
    """Dtype of a kernel of floats, or of the one that an adapter lies beside."""
    return cast(jax.Array, kernel.base if isinstance(kernel, LoRAWeight) else kernel).dtype


def lookup(table: jax.Array | LoRAWeight, ids: jax.Array) -> jax.Array:
    """Looks up rows `ids` of a table `[V, D]`. With an adapter: `base[ids] + a[ids] @ b`, without
    an array of the table's size."""
    if not isinstance(table, LoRAWeight):
        return table[ids]
    a, b = table.a[ids].astype(jnp.float32), table.b.astype(jnp.float32)
    rows = cast(jax.Array, table.base)[ids] + jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return rows if table.gain is None else rows * table.gain


def factors(x: jax.Array, table: jax.Array | LoRAWeight) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """Pairs `(x_i [.., n], table_i [V, n])` whose products `x_i @ table_i^T` sum to `x [.., D] @
    table^T`, in the dtype of `x`.

    `x (base + a b)^T = x base^T + (x b^T) a^T`.
    """
    if not isinstance(table, LoRAWeight):
        return ((x, table.astype(x.dtype)),)
    x = x if table.gain is None else x * table.gain.astype(x.dtype)
    return (x, cast(jax.Array, table.base).astype(x.dtype)), (
        _product(x, table.b.astype(x.dtype), 1),
        table.a.astype(x.dtype),
    )


def base_dot(x: jax.Array, kernel: jax.Array | QuantizedKernel) -> jax.Array:
    """`x [.., in] @ kernel [in, out]` for a kernel without an adapter: the one place that knows how
    a base is stored."""
    if isinstance(kernel, QuantizedKernel):
        return quantized_dot(x, kernel)
    kernel = kernel.astype(x.dtype)
    return x @ kernel if x.dtype == jnp.float32 else low_precision_dot(x, kernel)


def _dropped(x: jax.Array, key: jax.Array, share: float) -> jax.Array:
    return jnp.where(jax.random.bernoulli(key, 1 - share, x.shape), x / (1 - share), 0)


@jax.custom_vjp
def low_rank_dot(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """`(x [.., in] @ a [in, rank]) @ b [rank, out]`, sums in float32.

    Plain autodiff contracts the long axes of `x` and of the cotangent by transposing both in
    memory, which on a CPU costs more than the products themselves; here only arrays with the rank
    as one side are transposed.
    """
    return _low_rank_forward(x, a, b)[0]


def _low_rank_forward(x, a, b):
    z = _product(x, a, 0)
    return _product(z, b, 0), (x, z, a, b)


def _low_rank_backward(saved, cotangent):
    x, z, a, b = saved
    d_z = _product(cotangent, b, 1)
    # The barrier keeps XLA from folding this transpose into a product that would transpose `x`
    # instead.
    d_a = jax.lax.optimization_barrier(dot_over_rows(d_z, x).astype(x.dtype)).T
    return _product(d_z, a, 1), d_a, dot_over_rows(z, cotangent).astype(x.dtype)


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def dot(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
    """Contracts the last axis of `x [.., n]` with an axis of a matrix `y`, without transposing `y`.
    Float32, whatever the operands are.

    XLA on a CPU has a fast product of bfloat16 matrices, but not of a single row: there it first
    writes all of `y` as float32. So a row of zeros goes along.
    """

    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        contract = (((x.ndim - 1,), (axis,)), ((), ()))
        return jax.lax.dot_general(x, y, contract, preferred_element_type=jnp.float32)

    def of_two_rows(x: jax.Array, y: jax.Array) -> jax.Array:
        return product(jnp.pad(_rows(x), ((0, 1), (0, 0))), y)[0].reshape(*x.shape[:-1], -1)

    if x.dtype == jnp.float32 or x.size > x.shape[-1]:
        return product(x, y)
    return jax.lax.platform_dependent(x, y, cpu=of_two_rows, default=product)


def _product(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
    """`dot` in the dtype of `x`."""
    return dot(x, y, axis).astype(x.dtype)


def dot_over_rows(x: jax.Array, y: jax.Array) -> jax.Array:
    """`sum_r x[r]^T y[r]` over all rows of `x [.., n]` and `y [.., m]`: float32 `[n, m]`, whatever
    the operands are.

    XLA on a CPU has no fast product of bfloat16 where the first axis of the left side is
    contracted: it writes both sides as float32. It folds a transpose into such a product, also
    through a barrier or a change of type, but not one with a row of zeros behind it.
    """

    def plain(x: jax.Array, y: jax.Array) -> jax.Array:
        rows = tuple(range(x.ndim - 1))  # not reshaped: a mesh may split them
        return jnp.tensordot(x, y, (rows, rows), preferred_element_type=jnp.float32)

    def transposed(x: jax.Array, y: jax.Array) -> jax.Array:
        return dot(jnp.pad(_rows(x).T, ((0, 1), (0, 0))), _rows(y), 0)[:-1]

    if x.dtype != jnp.bfloat16:
        return plain(x, y)
    return jax.lax.platform_dependent(x, y, cpu=transposed, default=plain)


low_rank_dot.defvjp(_low_rank_forward, _low_rank_backward)


@jax.custom_vjp
def low_precision_dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x [.., in] @ kernel [in, out]` with low-precision operands and a float32 accumulator, in the
    backward pass too.

    Plain autodiff of a float32-accumulating product multiplies a float32 cotangent with a bfloat16
    kernel, which leaves the fast path of every backend; here the cotangent is cast down first.
    """
    return _product(x, kernel, 0)


def _forward(x, kernel):
    # Keep only what the backward pass needs: a frozen kernel gets no gradient, so `x` is not saved
    # for it.
    saved = (x.value if kernel.perturbed else None, kernel.value if x.perturbed else None)
    return low_precision_dot(x.value, kernel.value), saved


def _backward(saved, cotangent):
    x, kernel = saved
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return None, None
    dx = dkernel = None
    if kernel is not None:
        dx = _product(cotangent, kernel, 1)  # `kernel.T` would be a temporary of its size
    if x is not None:
        dkernel = dot_over_rows(x, cotangent).astype(x.dtype)
    return dx, dkernel


low_precision_dot.defvjp(_forward, _backward, symbolic_zeros=True)


@jax.custom_vjp
def quantized_dot(x: jax.Array, kernel: QuantizedKernel) -> jax.Array:
    """`x [.., in] @ kernel [in, out]` in the dtype of `x`, accumulated in float32. The kernel has
    no gradient.

    The kernel is dequantised where it is used, and again in the backward pass: only the integers
    are kept, which exist anyway. Plain autodiff would keep the float kernel of every layer.
    """
    return _product(x, dequantize(kernel, x.dtype), 0)


def _quantized_forward(x, kernel):
    return quantized_dot(x, kernel), kernel


def _quantized_backward(kernel, cotangent):
    return _product(cotangent, dequantize(kernel, cotangent.dtype), 1), None


quantized_dot.defvjp(_quantized_forward, _quantized_backward)
