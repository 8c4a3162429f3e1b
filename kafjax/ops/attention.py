"""Grouped-query attention over new tokens and over a cache of past ones: one function, and the
kernels behind it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kafjax.core.errors import UserError
from kafjax.ops.blockwise import NEVER, blockwise_attention, soft_cap
from kafjax.ops.splash import splash_attention

ATTENTION = ("auto", "xla", "cudnn")
"""Who computes attention among new tokens: the platform's kernel (`kernel_for`), XLA by blocks of
keys, or cuDNN's fused kernel on NVIDIA GPUs. None of them has scores `[B, H, T, T]` in memory."""
NAMES = {
    "xla": "XLA, by blocks of keys",
    "splash": "the TPU's splash kernel",
    "cudnn": "cuDNN's fused kernel",
}
"""Kernels among new tokens, as a user is told of them. Over a cache it is always XLA."""
_MASKED = -1e30  # finite, so that a row with nothing to look at gives a mean instead of NaN


class Past(NamedTuple):
    """Keys and values `[B, N, K, D]` of a cache, and the age int32 `[B, N]` of each: how many
    positions it lies before the row's first new token, or `NEVER` where its slot is empty."""

    k: jax.Array
    v: jax.Array
    age_BxN: jax.Array


def ages(next_B: jax.Array, n_slots: int) -> jax.Array:
    """Ages `[B, N]` of the slots of a cache whose slot s holds the last position below `next_B`
    that is s modulo `n_slots`."""
    age_BxN = (next_B[:, None] - 1 - jnp.arange(n_slots, dtype=jnp.int32)) % n_slots + 1
    return jnp.where(age_BxN <= next_B[:, None], age_BxN, NEVER)


def kernel_for(asked: str, platform: str) -> str:
    """The kernel behind `asked`, a name in `ATTENTION`, on a platform of JAX's: splash on TPUs,
    else XLA."""
    return asked if asked != "auto" else "splash" if platform == "tpu" else "xla"


def attention(
    q_BxTxHxD: jax.Array,
    k_BxSxKxD: jax.Array,
    v_BxSxKxD: jax.Array,
    *,
    scale: float,
    cap: float | None = None,
    window: int | None = None,
    sliding: jax.Array | bool = True,
    segments: tuple[jax.Array, jax.Array] | None = None,
    past: Past | None = None,
    offset: jax.Array | int = 0,
    kernel: str = "xla",
) -> jax.Array:
    """Causal softmax attention over new tokens, and over past ones where there is a cache. Returns
    `[B, T, H, D]` in the dtype of `q`; scores and softmax are float32.

    Args:
      k_BxSxKxD, v_BxSxKxD: of the new tokens; H is a multiple of K, and query head h uses key head
        `h // (H / K)`.
      cap: bound of the scores (`soft_cap`).
      window: positions that a token sees, itself included; None for all.
      sliding: False where there is no window after all. It may be traced.
      segments: ids `[B, T]` and `[B, S]` int32 of packed sequences, whose tokens lie together;
        tokens see their own segment only. Not with a cache.
      offset: number of the first query among the S new tokens, where queries are a part of them.
      kernel: what `kernel_for` gives.

    Raises:
      UserError: the kernel does not compute this.
    """
    T, S = q_BxTxHxD.shape[1], k_BxSxKxD.shape[1]
    if past is None and kernel == "splash":
        return _splash(q_BxTxHxD, k_BxSxKxD, v_BxSxKxD, window, sliding, segments, scale, cap)
    within = limit(window, sliding)
    age_1xS = offset - jnp.arange(S, dtype=jnp.int32)[None]
    if past is None and kernel == "cudnn":
        return _cudnn(q_BxTxHxD, k_BxSxKxD, v_BxSxKxD, age_1xS, within, segments, scale, cap)
    if past is None:
        return blockwise_attention(
            q_BxTxHxD, k_BxSxKxD, v_BxSxKxD, age_1xS, segments, within, offset, scale, cap
        )
    past = past._replace(age_BxN=past.age_BxN + offset)
    if T == 1:  # the cache is read where it lies
        keys, values = [past.k, k_BxSxKxD], [past.v, v_BxSxKxD]
        seen = [
            jnp.broadcast_to(_seen(T, age, within), (q_BxTxHxD.shape[0], T, age.shape[1]))
            for age in (past.age_BxN, age_1xS)
        ]
        return attend(q_BxTxHxD, keys, values, seen, scale, cap)
    age_BxS = jnp.broadcast_to(age_1xS, (q_BxTxHxD.shape[0], S))
    new = Past(k_BxSxKxD, v_BxSxKxD, age_BxS)
    k, v, age = (jnp.concatenate(x, axis=1) for x in zip(past, new, strict=True))
    return blockwise_attention(q_BxTxHxD, k, v, age, None, within, None, scale, cap)


def limit(window: int | None, sliding: jax.Array | bool) -> Any:
    """Positions that a token sees: `window` where its layer slides, else all."""
    return NEVER if window is None else jnp.where(sliding, window, NEVER)


def _seen(n_queries: int, age_BxS: jax.Array, window: Any) -> jax.Array:
    """Mask `[B, T, S]`, True for the keys that each query sees."""
    distance_BxTxS = jnp.arange(n_queries, dtype=jnp.int32)[:, None] + age_BxS[:, None, :]
    return (distance_BxTxS >= 0) & (distance_BxTxS < window)


def _splash(
    q_BxTxHxD: jax.Array,
    k_BxTxKxD: jax.Array,
    v_BxTxKxD: jax.Array,
    window: int | None,
    sliding: jax.Array | bool,
    segments: tuple[jax.Array, jax.Array] | None,
    scale: float,
    cap: float | None,
) -> jax.Array:
    """`attention` by `splash_attention`, of which each window is a program of its own."""
    ids_BxT = None if segments is None else segments[0]

    def within(window: int | None) -> Any:
        return lambda q, k, v: splash_attention(q, k, v, ids_BxT, window, scale, cap)

    given = q_BxTxHxD, k_BxTxKxD, v_BxTxKxD
    if window is None or window >= q_BxTxHxD.shape[1]:
        return within(None)(*given)
    if isinstance(sliding, bool):
        return within(window if sliding else None)(*given)
    return jax.lax.cond(sliding, within(window), within(None), *given)


def attend(
    q_BxTxHxD: jax.Array,
    keys: list[jax.Array],
    values: list[jax.Array],
    masks: list[jax.Array],
    scale: float,
    cap: float | None = None,
) -> jax.Array:
    """Softmax attention of `q` over several blocks of keys and values at once. Returns `[B, T, H,
    D]`.

    Each block has `k, v [B, S, K, D]` with H a multiple of K (query head h uses key head h // (H /
    K)), and a boolean mask `[B, T, S]`, True where q may look. Blocks let a cache be read where it
    lies instead of being copied to take the new tokens in. Scores and softmax are float32. Scores
    are bounded by `cap` (`soft_cap`).
    """
    B, T, H, D = q_BxTxHxD.shape
    K = keys[0].shape[2]
    q_BxTxKxGxD = q_BxTxHxD.reshape(B, T, K, H // K, D)
    scores = [
        jnp.where(
            mask[:, None, None],
            soft_cap(
                jnp.einsum("btkgd,bskd->bkgts", q_BxTxKxGxD, k, preferred_element_type=jnp.float32)
                * scale,
                cap,
            ),
            _MASKED,
        )
        for k, mask in zip(keys, masks, strict=True)
    ]
    highest = jnp.max(jnp.stack([s.max(axis=-1, keepdims=True) for s in scores]), axis=0)
    weights = [jnp.exp(s - jax.lax.stop_gradient(highest)) for s in scores]
    total = sum(w.sum(axis=-1) for w in weights)
    mixed = sum(
        jnp.einsum("bkgts,bskd->btkgd", w.astype(v.dtype), v, preferred_element_type=jnp.float32)
        for w, v in zip(weights, values, strict=True)
    )
    total_BxTxKxGx1 = jnp.transpose(total, (0, 3, 1, 2))[..., None]
    return (mixed / total_BxTxKxGx1).astype(q_BxTxHxD.dtype).reshape(B, T, H, D)


def _cudnn(
    q_BxTxHxD: jax.Array,
    k_BxSxKxD: jax.Array,
    v_BxSxKxD: jax.Array,
    age_1xS: jax.Array,
    window: Any,
    segments: tuple[jax.Array, jax.Array] | None,
    scale: float,
    cap: float | None,
) -> jax.Array:
    """`attention` by cuDNN, differentiable. Raises `UserError` where cuDNN does not compute it: no
    NVIDIA GPU, float32, heads too large, scores with a bound."""
    if cap is not None:
        raise UserError(
            "cuDNN attention does not cap scores, as this model does; leave --attention at auto"
        )
    if (backend := jax.default_backend()) != "gpu":
        raise UserError(
            f"cuDNN attention needs an NVIDIA GPU, and JAX runs on {backend}; leave --attention at auto"
        )
    seen = _seen(q_BxTxHxD.shape[1], age_1xS, window)
    if segments is not None:
        seen = seen & (segments[0][:, :, None] == segments[1][:, None, :])
    try:
        return jax.nn.dot_product_attention(
            q_BxTxHxD,
            k_BxSxKxD,
            v_BxSxKxD,
            mask=seen[:, None],
            scale=scale,
            implementation="cudnn",
        )
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise UserError(
            f"cuDNN does not compute this attention ({error}); try --dtype=bfloat16, or leave --attention at auto"
        ) from error
