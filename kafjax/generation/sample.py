"""The next token from logits: greedy, or drawn at a temperature from the top k and the top p."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kafjax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 leave the distribution whole.

    `stop` strings end a reply and are cut off. Raises `UserError` for values out of range.
    """

    max_new_tokens: int = 24
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ("\n",)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError("sampling needs temperature >= 0, top_k >= 0 and 0 < top_p <= 1")
        if "" in self.stop:
            raise UserError("an empty stop string would end every reply at once")


def next_token(logits_BxV: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """Token ids int32 `[B]`. Nucleus sampling (Holtzman et al. 2020) keeps the smallest set whose mass reaches `top_p`."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    logits_BxV = logits_BxV / sampling.temperature
    if sampling.top_k:
        kth = jax.lax.top_k(logits_BxV, min(sampling.top_k, logits_BxV.shape[-1]))[0][:, -1:]
        logits_BxV = jnp.where(logits_BxV < kth, -jnp.inf, logits_BxV)
    if sampling.top_p < 1:
        sorted_BxV = jnp.sort(logits_BxV, axis=-1, descending=True)
        probabilities = jax.nn.softmax(sorted_BxV, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        lowest = jnp.min(jnp.where(before < sampling.top_p, sorted_BxV, jnp.inf), axis=-1, keepdims=True)
        logits_BxV = jnp.where(logits_BxV < lowest, -jnp.inf, logits_BxV)
    return jax.random.categorical(key, logits_BxV, axis=-1).astype(jnp.int32)
