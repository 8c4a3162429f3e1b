"""Training objective: next-token cross entropy at the places that a batch names."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kafjax.core import trees
from kafjax.models import Decoder
from kafjax.ops.linear import LoRAWeight
from kafjax.ops.loss import chunked_cross_entropy, even_chunk, used
from kafjax.training.batches import Batch


def loss(
    model: Decoder, params: trees.Tree, batch: Batch, chunk: int = 256, n_sequence: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Computes the weighted sum of token losses in nats and the sum of the weights, both float32
    scalars.

    They are sums, not means, so that those of microbatches (and their gradients) add up to those of
    the whole batch.

    Args:
      chunk: most logits rows alive at once, per data-parallel share.
      n_sequence: devices that the tokens of a row are split over; they share the places of each
        group evenly, used ones too.
    """
    constrain = model.constrain
    hidden_BxTxD, _ = model.hidden(
        params, batch.tokens_BxT, batch.positions_BxT, batch.segments_BxT
    )

    def gathered(table: jax.Array) -> jax.Array:  # once, not chunk by chunk
        return constrain(table.astype(model.dtype), ("vocab", None))

    embedding = model.unembedding(params)
    if isinstance(embedding, LoRAWeight):
        embedding = dataclasses.replace(
            embedding, base=gathered(embedding.base), a=gathered(embedding.a)
        )
    else:
        embedding = gathered(embedding)
    S, N = batch.places_SxN.shape
    hidden_SxPxD = hidden_BxTxD.reshape(S, -1, hidden_BxTxD.shape[-1])
    hidden_SxPxD = constrain(hidden_SxPxD, ("batch", None, None))
    padding = -N % n_sequence

    def split(x_SxN: jax.Array) -> jax.Array:
        # Dealt out like cards: used places come first, so in blocks the last devices would have
        # none.
        dealt = jnp.pad(x_SxN, ((0, 0), (0, padding))).reshape(S, -1, n_sequence).swapaxes(1, 2)
        return constrain(dealt, ("batch", "length", None))

    places, targets, weights = (
        split(batch.places_SxN),
        split(batch.targets_SxN),
        split(batch.weights_SxN),
    )
    size = even_chunk(places.shape[-1], chunk)
    # one number for all shares: a loop of another length each would compute all chunks in all
    n_used = used(weights)

    def share_loss(hidden_PxD, places_N, targets_N, weights_N):
        return chunked_cross_entropy(
            hidden_PxD[places_N],
            embedding,
            targets_N,
            weights_N,
            size,
            n_used,
            model.config.logit_cap,
        )

    if S == n_sequence == 1:
        total = share_loss(hidden_SxPxD[0], places[0, 0], targets[0, 0], weights[0, 0])
    else:
        of_group = jax.vmap(share_loss, in_axes=(None, 0, 0, 0))
        # each share stays on its devices
        total = jnp.sum(jax.vmap(of_group)(hidden_SxPxD, places, targets, weights))
    return total, jnp.sum(batch.weights_SxN)


def computed_places(weights_SxN: jax.Array, chunk: int, n_sequence: int = 1) -> jax.Array:
    """Counts the places that `loss` computes logits of, over all devices: int32 scalar. Arguments
    as of `loss`."""
    S, N = weights_SxN.shape
    size = even_chunk(-(-N // n_sequence), chunk)
    most_of_a_share = -(-used(weights_SxN) // n_sequence)
    return -(-most_of_a_share // size) * size * S * n_sequence
