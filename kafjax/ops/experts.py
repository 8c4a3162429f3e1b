"""A mixture of experts: each token goes through the few MLPs that a router chooses (Shazeer et al.
2017, arXiv:1701.06538)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def route(
    x_NxD: jax.Array, router_DxE: jax.Array, k: int, *, normalised: bool
) -> tuple[jax.Array, jax.Array]:
    """The `k` most probable experts of each token: shares float32 `[N, k]`, summing to 1 if
    `normalised`, and ids int32 `[N, k]`."""
    logits_NxE = jnp.matmul(
        x_NxD, router_DxE.astype(x_NxD.dtype), preferred_element_type=jnp.float32
    )
    shares_NxK, ids_NxK = jax.lax.top_k(jax.nn.softmax(logits_NxE), k)
    return shares_NxK / jnp.sum(
        shares_NxK, axis=-1, keepdims=True
    ) if normalised else shares_NxK, ids_NxK


def mixture(
    x_NxD: jax.Array,
    shares_NxK: jax.Array,
    ids_NxK: jax.Array,
    gate_ExDxF: jax.Array,
    up_ExDxF: jax.Array,
    down_ExFxD: jax.Array,
    gated: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Returns `sum_k shares[n, k] * down(gated(gate(x[n]), up(x[n])))` by expert `ids[n, k]`, `[N,
    D]` in the dtype of `x`.

    Tokens are sorted by expert, so that each product is one `ragged_dot` over groups of rows: no
    token is dropped or padded.
    """
    (n, k), n_experts = ids_NxK.shape, gate_ExDxF.shape[0]
    order = jnp.argsort(ids_NxK.ravel())  # of (token, choice) pairs, by expert
    sizes_E = jnp.bincount(ids_NxK.ravel(), length=n_experts).astype(jnp.int32)

    def product(x: jax.Array, kernels: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(
            x, kernels.astype(x.dtype), sizes_E, preferred_element_type=jnp.float32
        ).astype(x.dtype)

    sorted_x = x_NxD[order // k]
    out = product(gated(product(sorted_x, gate_ExDxF), product(sorted_x, up_ExDxF)), down_ExFxD)
    out_NxKxD = out[jnp.argsort(order)].reshape(n, k, -1)
    return jnp.einsum(
        "nkd,nk->nd", out_NxKxD, shares_NxK, preferred_element_type=jnp.float32
    ).astype(x_NxD.dtype)
