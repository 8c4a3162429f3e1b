"""Rematerialisation: policies of what is kept of a layer for the backward pass, which computes the
rest again (arXiv:1604.06174)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["layer_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
REMAT = ("none", *_POLICIES)
"""Names: keep everything; keep the products with kernels, not the attention's; keep the layer's
input only; keep that in the memory of the host, where the platform can move it (TPU and GPU)."""


def rematerialised(layer: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """`layer(x, ...)` that keeps what `policy`, a name in `REMAT`, says. Raises `KeyError` for
    another name."""
    if policy == "none":
        return layer

    def named(x: jax.Array, *rest: Any) -> Any:
        return layer(checkpoint_name(x, "layer_input"), *rest)

    return jax.checkpoint(named, policy=_POLICIES[policy])
