"""Log-likelihoods of given replies: how probable the model finds each of them behind a prompt.

prefix (cached)   [worked examples]
row               prompt, reply          a row for each reply; only the reply is scored
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kafjax.core import trees
from kafjax.core.programs import program
from kafjax.models import Cache, Decoder


@program(static=("n_reply",))
def reply_log_likelihoods(
    model: Decoder,
    params: trees.Tree,
    tokens_BxT: jax.Array,
    first_B: jax.Array,
    length_B: jax.Array,
    past: Cache | None,
    start: jax.Array,
    n_reply: int,
) -> jax.Array:
    """Sums the log-probabilities of the tokens of each row's reply, float32 `[B]`, in nats.

    Args:
      tokens_BxT: int32, padded on the right; `length_B` tokens of each row are real.
      first_B: place of the first token of the reply in its row, at least 1.
      past: cache of a prefix shared by all rows, batch 1, of which `start` slots are filled; None
        without a prefix.
      start: position of the first token of each row.
      n_reply: most tokens of a reply.
    """
    B, T = tokens_BxT.shape
    positions_BxT = jnp.broadcast_to(start + jnp.arange(T, dtype=jnp.int32), (B, T))
    # only padding lies beyond the context
    positions_BxT = jnp.minimum(positions_BxT, model.config.max_length - 1)
    if past is not None:
        past = jax.tree.map(lambda x: jnp.broadcast_to(x, (x.shape[0], B, *x.shape[2:])), past)
    hidden_BxTxD, _ = model.hidden(params, tokens_BxT, positions_BxT, past=past)
    places_BxN = first_B[:, None] + jnp.arange(n_reply, dtype=jnp.int32)
    is_reply_BxN = places_BxN < length_B[:, None]
    places_BxN = jnp.where(is_reply_BxN, places_BxN, 1)
    before_BxNxD = jnp.take_along_axis(hidden_BxTxD, (places_BxN - 1)[..., None], axis=1)
    logits_BxNxV = model.logits(params, before_BxNxD)
    chosen_BxN = jnp.take_along_axis(tokens_BxT, places_BxN, axis=1)
    chosen_BxN = jnp.take_along_axis(logits_BxNxV, chosen_BxN[..., None], axis=-1)[..., 0]
    log_p_BxN = chosen_BxN - jax.nn.logsumexp(logits_BxNxV, axis=-1)
    return model.constrain(jnp.sum(jnp.where(is_reply_BxN, log_p_BxN, 0.0), axis=-1), (None,))
