"""Kernels stored as small integers, for a base that nobody trains: int8, or the 4-bit NormalFloat
of QLoRA.

    int8   values int8  [.., in, out]       w = scale[out] * value                    one scale a column: max |w| / 127.5
    nf4    values uint8 [.., in / 2, out]   w = scale[in // 64, out] * NF4[value]     one for 64 inputs of a column: max |w|

(nf4: Dettmers et al. 2023, arXiv:2305.14314, section 3, without its double quantisation: scales
stay float32.) qwix chooses scales and integers. Two of the 4-bit ones share a byte: `uint4` arrays
would do that on the device too, but XLA on a CPU widens those of all layers to a byte each before
the loop over layers. Only kernels of linear layers are stored so. Embeddings keep their dtype: they
are looked up, and make the logits.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kafjax.core import trees
from kafjax.core.errors import UserError, nearest

FORMATS = ("int8", "nf4")
TILE = 64
NF4 = np.array(
    [
        *(
            -1.0,
            -0.6961928009986877,
            -0.5250730514526367,
            -0.39491748809814453,
            -0.28444138169288635,
        ),
        *(
            -0.18477343022823334,
            -0.09105003625154495,
            0.0,
            0.07958029955625534,
            0.16093020141124725,
            0.24611230194568634,
        ),
        *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
"""The 16 values of a normalised weight (arXiv:2305.14314, appendix E): quantiles of a normal
distribution, zero among them."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedKernel:
    """A frozen kernel `[.., in, out]` stored as integers, in its place in the parameter tree. Only
    `ops.linear` multiplies with it.

    It defines no array conversion, so that dequantising it by accident raises.

    Attributes:
      values: int8 `[.., in, out]`, or uint8 `[.., in / 2, out]` of two indices into `NF4` each: of
        a tile of t inputs, byte i holds those of input i (low bits) and i + t / 2.
      scale: float32 `[.., tiles, out]`.
      format: a name in `FORMATS`.
    """

    values: jax.Array
    scale: jax.Array
    format: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dequantised kernel."""
        *stacked, n_rows, n_out = self.values.shape
        return (*stacked, 2 * n_rows if self.format == "nf4" else n_rows, n_out)


@functools.partial(jax.jit, static_argnames="format")
def quantize(kernel: jax.Array, format: str) -> QuantizedKernel:
    """Rounds a kernel `[.., in, out]` to the nearest values of `format`, computed in float32.

    nf4 has tiles of 64 inputs, or of the largest smaller even number that divides them. Raises
    `UserError` for an unknown format, and for nf4 of an odd number of inputs.
    """
    if format not in FORMATS:
        raise UserError(
            f"unknown format '{format}' of a quantised kernel. {nearest(format, FORMATS)}"
        )
    n_in, n_out = kernel.shape[-2:]
    if format == "nf4" and n_in % 2:
        raise UserError(
            f"a kernel {list(kernel.shape)} cannot be stored in nf4: its {n_in} inputs are an odd number; use int8"
        )

    import qwix  # half a second, which only quantising takes

    def of_layer(w: jax.Array) -> QuantizedKernel:
        if format == "int8":
            q = qwix.quantize(w, jnp.int8, channelwise_axes=(1,))
            return QuantizedKernel(q.qvalue, q.scale, format)
        tile = max(t for t in range(2, TILE + 1, 2) if n_in % t == 0)
        q = qwix.quantize(w, "nf4", channelwise_axes=(1,), tiled_axes={0: tile})
        low, high = jnp.split(q.qvalue.astype(jnp.uint8).reshape(-1, tile, n_out), 2, axis=1)
        return QuantizedKernel((low | high << 4).reshape(-1, n_out), q.scale, format)

    w = kernel.astype(jnp.float32)
    # one by one: what is searched for is 16 times a layer
    return of_layer(w) if w.ndim == 2 else jax.lax.map(of_layer, w)


def dequantize(kernel: QuantizedKernel, dtype: Any = jnp.float32) -> jax.Array:
    """Multiplies out the kernel `[.., in, out]` in float32."""
    *stacked, n_tiles, n_out = kernel.scale.shape
    tiles = kernel.values.reshape(*stacked, n_tiles, -1, n_out)
    if kernel.format == "nf4":
        tiles = jnp.asarray(NF4)[jnp.concatenate([tiles & 15, tiles >> 4], axis=-2)]
    return (
        (tiles.astype(jnp.float32) * kernel.scale[..., None, :]).reshape(kernel.shape).astype(dtype)
    )


def dense(kernel: jax.Array | QuantizedKernel) -> jax.Array:
    """Returns any kernel as a float32 array."""
    return dequantize(kernel) if isinstance(kernel, QuantizedKernel) else kernel.astype(jnp.float32)


def quantize_params(params: Mapping[str, Any], format: str) -> trees.Tree:
    """Returns `params` with every kernel in `format`, other arrays unchanged.

    Raises `UserError` as `quantize` does, if it was done, and for experts, which would stay the
    floats that most of the model is.
    """
    if experts := [path for path in trees.flatten(params) if path.endswith("_experts")]:
        raise UserError(
            f"'{experts[0]}' cannot be quantised: only plain kernels are; leave the base of a mixture of experts as floats"
        )
    if (there := format_of(params)) is not None:
        raise UserError(f"these parameters are quantised already ({there})")
    return trees.map_with_path(
        lambda path, leaf: quantize(leaf, format) if path.split("/")[-1] == "kernel" else leaf,
        params,
    )


def abstract(params: Mapping[str, Any], format: str) -> trees.Tree:
    """Shapes and dtypes of `quantize_params(params, format)`. Raises `UserError` as that does."""
    return jax.eval_shape(functools.partial(quantize_params, format=format), params)


def dequantize_params(params: Mapping[str, Any]) -> trees.Tree:
    """Returns `params` with plain float32 kernels in place of quantised ones."""
    return trees.map_with_path(
        lambda _, leaf: dequantize(leaf) if isinstance(leaf, QuantizedKernel) else leaf, params
    )


def format_of(params: Mapping[str, Any]) -> str | None:
    """The format that kernels of `params` are stored in; None if none is quantised."""
    return next(
        (
            leaf.format
            for leaf in trees.flatten(params).values()
            if isinstance(leaf, QuantizedKernel)
        ),
        None,
    )


def refuse_quantized(params: Mapping[str, Any], what: str) -> None:
    """Raises `UserError` if `params` are quantised, since `what` needs floats."""
    if (format := format_of(params)) is not None:
        raise UserError(
            f"{what} needs kernels of floats, and these are stored in {format}: use the float base (or dequantize_params)"
        )
