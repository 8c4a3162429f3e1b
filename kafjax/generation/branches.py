"""Prompts that share their beginning: it is computed once, and each prompt branches off where its
tokens depart from it.

    trunk    [worked examples] passage 1, passage 2, passage 3, question
    branch   [worked examples] passage 1,                       question     sees the slots of passage 1 and writes behind them

A branch has the tokens of its prompt, whatever the tokenizer makes of seams, so its reply is that
of the prompt alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kafjax.core import trees
from kafjax.core.programs import program
from kafjax.models import Cache, Decoder, caches


@program(static=("n_free",))
def prefill_branches(
    model: Decoder,
    params: trees.Tree,
    tokens_BxT: jax.Array,
    length_B: jax.Array,
    trunks: Cache,
    trunk_B: jax.Array,
    start_B: jax.Array,
    n_free: int,
) -> tuple[jax.Array, Cache]:
    """Runs what each branch adds to its trunk. Returns hidden states `[B, D]` of each row's last
    token, and a cache of each row.

    Args:
      tokens_BxT: int32, padded on the right; `length_B` tokens of each row are real.
      trunks: cache of the trunks, `[L, R, S, K, Dh]`, whole in sliding layers, too.
      trunk_B: the trunk of each row.
      start_B: slots of it that the row sees; its first token takes the next one. The trunk's
        further slots are overwritten, or masked until they are.
      n_free: slots left empty for the tokens to come.
    """
    T = tokens_BxT.shape[1]
    positions_BxT = start_B[:, None] + jnp.arange(T, dtype=jnp.int32)
    past = jax.tree.map(lambda x_LxRxSxKxD: x_LxRxSxKxD[:, trunk_B], trunks)
    hidden_BxTxD, new = model.hidden(params, tokens_BxT, positions_BxT, past=past)
    last_BxD = jnp.take_along_axis(hidden_BxTxD, (length_B - 1)[:, None, None], axis=1)[:, 0]

    slots = caches.longest(past) + T + n_free
    cache = caches.extended(model.config, past, new, start_B, start_B + length_B, slots)
    axes = (None, "batch", None, "kv_heads", None)
    return model.constrain(last_BxD, ("batch", None)), jax.tree.map(
        lambda block: model.constrain(block, axes), cache
    )


def n_shared(tokens: Sequence[int], trunk: Sequence[int]) -> int:
    """Counts the tokens that a branch takes from its trunk: those that are alike from the first on,
    but for the branch's last.

    The last is run anyway: its state makes the first token of the reply.
    """
    alike = next(
        (n for n, (a, b) in enumerate(zip(tokens, trunk, strict=False)) if a != b),
        min(len(tokens), len(trunk)),
    )
    return min(alike, len(tokens) - 1)
