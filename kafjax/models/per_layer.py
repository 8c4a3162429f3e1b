"""Per-layer embeddings (Gemma 3n and 4): each token has a small vector for each layer, which the
layer takes in behind its MLP."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from kafjax.models.config import DecoderConfig
from kafjax.models.layers import Embedding, Projection, RMSNorm


class PerLayerEmbedding(nnx.Module):
    """The vectors of all layers: the mean of a token's own and of a normed projection of its
    embedding, times sqrt(2)."""

    def __init__(self, cfg: DecoderConfig, rngs: nnx.Rngs):
        width = cfg.n_layers * cfg.per_layer_size
        self.embed = Embedding(cfg.per_layer_vocab, width, ("vocab", "embed"), rngs=rngs)
        self.proj = Projection(cfg.hidden_size, width, ("embed", None), rngs=rngs)
        self.norm = RMSNorm(cfg.per_layer_size, cfg.norm_eps, cfg.norm_offset, None)
        self.sizes = (cfg.n_layers, cfg.per_layer_size)

    def __call__(self, tokens_BxT: jax.Array, x_BxTxD: jax.Array) -> jax.Array:
        """Returns `[L, B, T, P]` in the dtype of `x`, the scaled embeddings."""
        dtype, (n_layers, size) = x_BxTxD.dtype, self.sizes

        def of_layers(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:2], n_layers, size)

        own = of_layers(self.embed(tokens_BxT).astype(dtype)) * jnp.asarray(size**0.5, dtype)
        projected = self.norm(
            of_layers(self.proj(x_BxTxD) * jnp.asarray(x_BxTxD.shape[-1] ** -0.5, dtype))
        )
        return jnp.moveaxis((projected + own) * jnp.asarray(2**-0.5, dtype), 2, 0)


class PerLayerInput(nnx.Module):
    """A layer's use of the vectors of its tokens: `norm(proj(activation(gate(x)) * vector))`."""

    def __init__(self, cfg: DecoderConfig, rngs: nnx.Rngs):
        self.gate = Projection(cfg.hidden_size, cfg.per_layer_size, ("embed", None), rngs=rngs)
        self.proj = Projection(cfg.per_layer_size, cfg.hidden_size, (None, "embed"), rngs=rngs)
        self.norm = RMSNorm(cfg.hidden_size, cfg.norm_eps, cfg.norm_offset)

    def __call__(
        self,
        x_BxTxD: jax.Array,
        vectors_BxTxP: jax.Array,
        activation: Callable[[jax.Array], jax.Array],
    ) -> jax.Array:
        return self.norm(self.proj(activation(self.gate(x_BxTxD)) * vectors_BxTxP))
