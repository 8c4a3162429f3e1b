"""Attention among new tokens by JAX's splash kernel for TPUs: scores stay in the chip's fast memory,
and blocks that no query may look at are skipped."""

from __future__ import annotations

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
    T, H = q_BxTxHxD.shape[1:3]
    block = min(LARGEST, T + -T % LANES)
    padding = -T % block
    padded = T + padding

    def by_head(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))), 1, 2)

    # Padding lies behind every token, so that causality hides it.
    mask = splash.LocalMask((padded, padded), (None if window is None else window - 1, 0), 0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * H),
        block_sizes=_block_sizes(block),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=cap,
        interpret=interpret,
    )
    ids = None
    if segments_BxT is not None:
        ids_BxT = jnp.pad(segments_BxT, ((0, 0), (0, padding)))
        ids = splash.SegmentIds(ids_BxT, ids_BxT)
    q = (q_BxTxHxD.astype(jnp.float32) * scale).astype(q_BxTxHxD.dtype)
    out = jax.vmap(kernel)(by_head(q), by_head(k_BxTxKxD), by_head(v_BxTxKxD), ids)
    return jnp.swapaxes(out, 1, 2)[:, :T]


def _block_sizes(block: int) -> Any:
    sizes: dict[str, Any] = dict.fromkeys(
        (
            *("block_q", "block_kv", "block_kv_compute", "block_q_dq", "block_kv_dq"),
            *("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"),
        ),
        block,
    )
    return splash.BlockSizes(**sizes)
