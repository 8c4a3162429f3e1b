"""A BERT that reads two texts together and scores how well they fit (Nogueira & Cho 2019).

params = {"embeddings": ..., "layers": ...,                    an `Encoder`'s
          "pooler": {"kernel": [D, D], "bias": [D]}, "classifier": {"kernel": [D, 1], "bias": [1]}}
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kafjax.core import trees
from kafjax.models.encoder import Encoder
from kafjax.models.pooling import dense


@dataclasses.dataclass(frozen=True, eq=False)
class CrossEncoder:
    """An encoder with BERT's pooler and a classifier of one label. `activation`, a name in
    `ACTIVATIONS`, makes the score of its logit."""

    encoder: Encoder
    activation: str = "sigmoid"

    def abstract_params(self) -> trees.Tree:
        """Shapes and dtypes (float32) of the parameters."""
        D = self.encoder.config.hidden_size
        head = {"pooler": _linear(D, D), "classifier": _linear(D, 1)}
        return {**self.encoder.abstract_params(), **head}

    def apply(
        self, params: trees.Tree, tokens_BxT: jax.Array, mask_BxT: jax.Array, types_BxT: jax.Array
    ) -> jax.Array:
        """Computes one score a row, float32 `[B]`. Types, int32, are 0 on the first text and 1 on
        the second."""
        first_BxD = self.encoder.hidden(params, tokens_BxT, mask_BxT, types_BxT)[:, 0]
        pooled_BxD = dense(first_BxD, **_named(params["pooler"]), activation="tanh")
        return dense(pooled_BxD, **_named(params["classifier"]), activation=self.activation)[:, 0]


def _linear(n_in: int, n_out: int) -> trees.Tree:
    return {
        "kernel": jax.ShapeDtypeStruct((n_in, n_out), jnp.float32),
        "bias": jax.ShapeDtypeStruct((n_out,), jnp.float32),
    }


def _named(layer: trees.Tree) -> dict[str, jax.Array]:
    return {"kernel_IxO": layer["kernel"], "bias_O": layer["bias"]}
