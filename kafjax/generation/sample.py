"""The next token from logits: greedy, or drawn at a temperature from the top k and the top p."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kafjax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling parameters. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 leave the
    distribution whole.

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
        if not 0 <= self.temperature < float("inf") or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError("sampling needs temperature >= 0, top_k >= 0 and 0 < top_p <= 1")
        if "" in self.stop:
            raise UserError("an empty stop string would end every reply at once")

    def distribution(self) -> Sampling:
        """The parameters that shape the distribution of a token. Compiled programs depend on these
        alone."""
        return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


def next_token(logits_BxV: jax.Array, key_B: jax.Array, sampling: Sampling) -> jax.Array:
    """Token ids int32 `[B]`, each row drawn with its own key.

    Of equally likely tokens the lower id comes first. Nucleus sampling (Holtzman et al. 2020) keeps
    the smallest set whose mass reaches `top_p`, here of what `top_k` left.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    draw = jax.vmap(jax.random.categorical)
    logits_BxV = logits_BxV / sampling.temperature
    vocab_size = logits_BxV.shape[-1]
    if not sampling.top_k and sampling.top_p == 1:
        return draw(key_B, logits_BxV).astype(jnp.int32)
    best_BxK, token_BxK = jax.lax.top_k(logits_BxV, min(sampling.top_k or vocab_size, vocab_size))
    if sampling.top_p < 1:
        mass_BxK = jax.nn.softmax(best_BxK, axis=-1)
        before_BxK = jnp.cumsum(mass_BxK, axis=-1) - mass_BxK
        best_BxK = jnp.where(before_BxK < sampling.top_p, best_BxK, -jnp.inf)
    return jnp.take_along_axis(token_BxK, draw(key_B, best_BxK)[:, None], axis=-1)[:, 0]
