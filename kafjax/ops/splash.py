"""Attention among new tokens by JAX's splash kernel for TPUs: scores stay in the chip's fast memory,
and blocks that no query may look at are skipped."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

LANES = 128
"""Tokens of a block are a multiple of these."""
LARGEST = 512
"""Tokens of a block at most: larger ones do not fit beside heads of 256."""


def splash_attention(
    q_BxTxHxD: jax.Array,
    k_BxTxKxD: jax.Array,
    v_BxTxKxD: jax.Array,
    segments_BxT: jax.Array | None,
    window: int | None,
    scale: float,
    cap: float | None,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention `[B, T, H, D]` in the dtype of `q`, differentiable; arguments as those of
    `ops.attention.attention`.

    Rows are padded to whole blocks. `interpret` runs the kernel without a TPU, slowly.
    """
    T = q_BxTxHxD.shape[1]
    block = min(LARGEST, T + -T % LANES)
    padding = -T % block

    def by_head(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))), 1, 2)

    ids_BxT = (
        segments_BxT if segments_BxT is None else jnp.pad(segments_BxT, ((0, 0), (0, padding)))
    )
    q = (q_BxTxHxD.astype(jnp.float32) * scale).astype(q_BxTxHxD.dtype)
    given = by_head(q), by_head(k_BxTxKxD), by_head(v_BxTxKxD)
    out = _splash(*given, ids_BxT, window, cap, block, interpret)
    return jnp.swapaxes(out, 1, 2)[:, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _splash(q, k, v, ids_BxT, window, cap, block, interpret):
    return _forward(q, k, v, ids_BxT, window, cap, block, interpret)[0]


def _forward(q, k, v, ids_BxT, window, cap, block, interpret):
    H, T = q.shape[1:3]
    # Padding lies behind every token, so that causality hides it.
    mask = splash.LocalMask((T, T), (None if window is None else window - 1, 0), 0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * H),
        block_sizes=_block_sizes(block),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=cap,
        interpret=interpret,
    )
    ids = None if ids_BxT is None else splash.SegmentIds(ids_BxT, ids_BxT)
    with _precision(q):
        return jax.vjp(lambda q, k, v: jax.vmap(kernel)(q, k, v, ids), q, k, v)


def _backward(window, cap, block, interpret, pull_back, d_out):
    with _precision(d_out):
        return *pull_back(d_out), None


def _precision(x: jax.Array) -> AbstractContextManager[Any]:
    """Precision of the kernel's products: the highest is refused for low-precision operands, whose
    products are exact anyway."""
    return jax.default_matmul_precision("highest" if x.dtype == jnp.float32 else "default")


_splash.defvjp(_forward, _backward)


def _block_sizes(block: int) -> Any:
    sizes: dict[str, Any] = dict.fromkeys(
        (
            *("block_q", "block_kv", "block_kv_compute", "block_q_dq", "block_kv_dq"),
            *("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"),
        ),
        block,
    )
    return splash.BlockSizes(**sizes)
