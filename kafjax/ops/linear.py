"""The one `linear`: a matrix product that knows plain kernels and kernels with a LoRA adapter beside them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoRAWeight:
    """A frozen kernel `base [.., in, out]` with its adapter `a [.., in, rank]`, `b [.., rank, out]`.

    The scale alpha / rank is already folded into `b`. It stands where a kernel stands in the parameter tree, and only
    `linear` knows it. It defines no array conversion, so that making `base + a @ b` by accident raises.
    """

    base: jax.Array
    a: jax.Array
    b: jax.Array


def linear(x: jax.Array, kernel: jax.Array | LoRAWeight) -> jax.Array:
    """`x [.., in] @ kernel [in, out]`, in the dtype of `x`, accumulated in float32.

    With a `LoRAWeight` it is `x @ base + (x @ a) @ b` (Hu et al. 2021, equation 3): nothing of the size of the base is made.
    """
    if isinstance(kernel, LoRAWeight):
        return _dot(x, kernel.base) + _dot(_dot(x, kernel.a), kernel.b)
    return _dot(x, kernel)


def _dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
    kernel = kernel.astype(x.dtype)
    return x @ kernel if x.dtype == jnp.float32 else low_precision_dot(x, kernel)


@functools.partial(jax.custom_vjp)
def low_precision_dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x [.., in] @ kernel [in, out]` with low-precision operands and a float32 accumulator, in the backward pass too.

    Plain autodiff of a float32-accumulating product multiplies a float32 cotangent with a bfloat16 kernel, which
    leaves the fast path of every backend; here the cotangent is cast down first.
    """
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32).astype(x.dtype)


def _forward(x, kernel):
    # Keep only what the backward pass needs: a frozen kernel gets no gradient, so `x` is not saved for it.
    saved = (x.value if kernel.perturbed else None, kernel.value if x.perturbed else None)
    return low_precision_dot(x.value, kernel.value), saved


def _backward(saved, cotangent):
    x, kernel = saved
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return None, None
    dx = dkernel = None
    if kernel is not None:
        # Contracted over the kernel's second axis as it lies: `kernel.T` would be a temporary of its size.
        contract = (((cotangent.ndim - 1,), (1,)), ((), ()))
        dx = jax.lax.dot_general(cotangent, kernel, contract, preferred_element_type=jnp.float32).astype(cotangent.dtype)
    if x is not None:
        rows = tuple(range(x.ndim - 1))
        dkernel = jnp.tensordot(x, cotangent, (rows, rows), preferred_element_type=jnp.float32).astype(x.dtype)
    return dx, dkernel


low_precision_dot.defvjp(_forward, _backward, symbolic_zeros=True)
