"""What training minimises: next-token cross entropy at the places a batch names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kafjax.models import Decoder
from kafjax.ops.loss import chunked_cross_entropy
from kafjax.training.batches import Batch


def loss(model: Decoder, params: Mapping[str, Any], batch: Batch, chunk: int = 256) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of token losses in nats and the sum of the weights, both float32 scalars.

    Sums, not means: over microbatches they (and their gradients) add up to those of the whole batch.

    Args:
      chunk: most logits rows alive at once, per data-parallel share.
    """
    hidden_BxTxD, _ = model.hidden(params, batch.tokens_BxT, batch.positions_BxT, batch.segments_BxT)
    S, N = batch.places_SxN.shape
    hidden_SxPxD = hidden_BxTxD.reshape(S, -1, hidden_BxTxD.shape[-1])
    n_chunks = -(-N // chunk)
    even_chunk = -(-N // n_chunks)  # equal chunks: no rows are computed only to fill the last one

    def share_loss(hidden_PxD, places_N, targets_N, weights_N):
        return chunked_cross_entropy(hidden_PxD[places_N], model.unembedding(params), targets_N, weights_N, even_chunk)

    shares = (hidden_SxPxD, batch.places_SxN, batch.targets_SxN, batch.weights_SxN)
    if S == 1:
        total = share_loss(*(x[0] for x in shares))
    else:
        total = jnp.sum(jax.vmap(share_loss)(*shares))  # each share stays on its devices
    return total, jnp.sum(batch.weights_SxN)
