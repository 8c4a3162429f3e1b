"""Demands of a training step or of serving on the devices, for `parallel.estimate`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kafjax import lora
from kafjax.core import trees
from kafjax.evaluation import cost
from kafjax.models import Decoder, DecoderConfig, caches
from kafjax.models.config import LayerShape
from kafjax.ops.attention import kernel_for
from kafjax.ops.blockwise import BLOCK
from kafjax.ops.splash import LARGEST
from kafjax.parallel import make_mesh
from kafjax.parallel.chips import UNKNOWN, chip_of
from kafjax.parallel.estimate import Demand, choose, show
from kafjax.parallel.mesh import slices_of
from kafjax.training.config import TrainConfig

_STATE_MOMENTS = {
    "adamw": lambda size: size + 4,
    "adafactor": lambda size: 0.02,
    "muon": lambda size: size,
}
"""Bytes of optimizer state a parameter, by the bytes of its dtype: the first moment takes that,
AdamW's second 4; Adafactor's rows and columns are next to nothing."""


def auto_mesh(
    model: Decoder, config: TrainConfig, spec: lora.Spec | None = None
) -> tuple[Mesh, str]:
    """Makes the mesh of all devices that the formulas rank first for a training, and gives the
    reason in a line."""
    devices = jax.devices()
    chip, n_slices = chip_of(devices[0]), slices_of(devices)
    sizes, reason = choose(
        training_demand(model, config, spec), len(devices), chip or UNKNOWN, n_slices
    )
    guessed = "" if chip or len(devices) == 1 else " (whose speeds are guessed here)"
    return make_mesh(sizes, devices), f"{show(sizes, n_slices)}: {reason}{guessed}"


def decoder_shape(model: Decoder) -> cost.DecoderShape:
    """Sizes of the decoder that the cost formulas need; of experts those count that a token goes
    through."""
    config = model.config
    return cost.DecoderShape(
        block_params=sum(_size(model, path, leaf) for path, leaf in _kernels(model).items()),
        layers=config.n_layers,
        heads=config.n_heads,
        head_dim=config.head_dim,
        d_model=config.hidden_size,
        vocab=config.vocab_size,
        sliding_layers=sum(config.sliding),
        window=config.window or 0,
        full_head_dim=config.full_head_dim or 0,
    )


def training_demand(
    model: Decoder, config: TrainConfig, spec: lora.Spec | None = None, lanes: int = 1
) -> Demand:
    """Computes the demand of a training step on full rows, where every token is a target.

    It is a step of full fine-tuning, or with `spec` of a LoRA adapter (or of `lanes` adapters, each
    on a batch of its own)."""
    c, shape, axes = jnp.dtype(model.dtype).itemsize, decoder_shape(model), _Widths.of(model)
    trained_size = jnp.dtype(config.param_dtype).itemsize
    everything = trees.count(model.abstract_params())
    kernels = trees.count(_kernels(model))
    ends = trees.count(
        {name: leaf for name, leaf in model.abstract_params().items() if name != "layers"}
    )
    adapter = (
        0
        if spec is None
        else sum(x.size for x in jax.tree.leaves(lora.abstract(spec, model.abstract_params())))
    )
    trained = adapter * lanes or (everything - ends if config.freeze_embedding else everything)
    rows = lanes * config.batch_rows
    tokens = rows * config.seq_len
    if spec is None:
        flops = cost.train_flops_full(
            shape, tokens, tokens, config.seq_len, embedding_trained=not config.freeze_embedding
        )
    else:
        flops = cost.train_flops_lora(shape, tokens, tokens, config.seq_len, adapter_params=adapter)
    again = {"none": 0.0, "dots": 0.0, "full": 1.0, "offload": 1.0}[config.remat]
    kernel = _Kernel.of(model)
    pairs = rows * kernel.flops(shape, config.seq_len)
    needed = 3 * cost.attention_flops(shape, config.seq_len) * rows
    computed = pairs * (kernel.products / 2 + (config.remat != "none"))
    kept = {
        "none": c * axes.inner + 4.0 * shape.heads,
        "dots": c * (axes.dots + axes.hidden),
        "full": c * axes.hidden,
        "offload": 0.0,
    }[config.remat]
    passes = 3 + again
    return Demand(
        model_flops=flops,
        flops=flops + again * 2 * shape.block_params * tokens + computed - needed,
        state=trained * (trained_size + _STATE_MOMENTS[config.optimizer](trained_size)),
        gradients=trained * (trained_size + (4 if config.accumulate > 1 else 0)),
        frozen=(everything - (0 if spec else trained)) * c,
        kernels=kernels * c,
        copied=0.0 if spec or trained_size == c else kernels * c,
        reduced=trained * c,
        ends=ends * c,
        n_layers=shape.layers,
        rows=rows,
        seq_len=config.seq_len,
        micro=config.accumulate,
        residual=axes.hidden * c,
        kept=kept,
        kept_is_split=config.remat in ("none", "dots"),
        transient=2 * c * axes.widest + kernel.transient(shape, config.seq_len),
        kv=2 * axes.kv * c,
        loss=min(config.loss_chunk, tokens) * shape.vocab * 4.0 * 2,
        weight_reads=passes if spec is None else passes - 1,
        gathers=2,
        # backward before q, k, v, gate and up: the compilers do not add these up first
        reduces=2 + 5 + 2 * again,
        traffic=2 * passes * c * axes.inner + passes * kernel.traffic(shape, config.seq_len, c),
        limits=axes.limits(model, config.seq_len),
        lanes=lanes,
    )


def serving_demand(model: Decoder, rows: int, past: int, new: int) -> Demand:
    """Computes the demand of running `new` tokens on each of `rows` rows with `past` tokens in the
    cache, and drawing the next.

    `past=0` is prefill, `new=1` a step of decoding. Weights are kept in the compute dtype."""
    c, shape, axes = jnp.dtype(model.dtype).itemsize, decoder_shape(model), _Widths.of(model)
    flops = rows * cost.query_flops(shape, past + new, 1, past)
    kernel, scores = _Kernel.of(model), 4.0 * shape.heads * (past + new)
    all_pairs = new * 4 * shape.heads * shape.head_dims * (past + new)
    computed = all_pairs if past else kernel.flops(shape, new)
    slots = _mean(
        [
            _of_layer(model.config, model.config.shape(i))[0]
            * caches.n_slots(model.config, slides, past + new)
            for i, slides in enumerate(model.config.sliding)
        ]
    )
    cache = 2 * c * slots / new  # of a new token, for the whole row's
    return Demand(
        model_flops=flops,
        flops=flops + rows * (computed - cost.attention_flops(shape, past + new, past)),
        state=0.0,
        gradients=0.0,
        frozen=trees.count(model.abstract_params()) * c,
        kernels=(trees.count(_kernels(model)) + shape.d_model * shape.vocab) * c,
        copied=0.0,
        reduced=0.0,
        ends=0.0,
        n_layers=shape.layers,
        rows=rows,
        seq_len=new,
        micro=1,
        residual=axes.hidden * c,
        kept=cache * (2 if past else 1),  # for some shapes XLA for TPUs has the loop work on a copy
        kept_is_split=True,
        # a token of decoding has its scores over the whole cache
        transient=max(2 * c * axes.widest, 1.5 * scores)
        if past
        else 2 * c * axes.widest + kernel.transient(shape, new),
        kv=0.0,
        loss=rows * shape.vocab * 4.0 * 2,
        weight_reads=1,
        gathers=1,
        reduces=2,
        traffic=2 * c * axes.inner
        + cache
        + (4 * scores if past else kernel.traffic(shape, new, c)),
        limits=axes.limits(model, 1),
    )


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """Attention among new tokens: tokens of a block, products of forward and backward pass, and
    whether scores are in memory at all."""

    block: int
    products: int
    stores_scores: bool

    @classmethod
    def of(cls, model: Decoder) -> _Kernel:
        """Finds the kernel of the model's devices. Both backward passes compute the scores again,
        and splash does it twice, for queries and for keys."""
        if kernel_for(model.attention, model.constrain.platform) == "splash":
            return cls(LARGEST, 2 + 7, stores_scores=False)
        return cls(BLOCK, 2 + 5, stores_scores=True)

    def flops(self, shape: cost.DecoderShape, length: int) -> float:
        """FLOPs of the forward pass over a row: whole blocks, of which the mask hides a part."""
        full = (shape.layers - shape.sliding_layers) * (shape.full_head_dim or shape.head_dim)
        sliding = shape.sliding_layers * shape.head_dim
        seen = full * self._pairs(length, length) + sliding * self._pairs(length, shape.window)
        return 4.0 * shape.heads * seen

    def transient(self, shape: cost.DecoderShape, length: int) -> float:
        """Bytes of a token for the scores of the blocks that are alive."""
        block = min(self.block, length)
        return 3 * 4.0 * shape.heads * block * block / length if self.stores_scores else 0.0

    def traffic(self, shape: cost.DecoderShape, length: int, itemsize: int) -> float:
        """Bytes of a token, layer and pass: scores, or the keys and values that each block of
        queries reads."""
        of_all = self.flops(shape, length) / (4 * shape.heads * shape.head_dims * length)
        if self.stores_scores:
            return 4 * 4.0 * shape.heads * of_all
        return 2 * shape.heads * shape.head_dim * itemsize * of_all / min(self.block, length)

    def _pairs(self, length: int, window: int) -> int:
        """Pairs of a query and a key that are computed for one head."""
        block = min(self.block, length)
        starts = range(0, length, block)
        visited = ((i + block) // block - max(i - window + 1, 0) // block for i in starts)
        return sum(n * block * block for n in visited)


@dataclasses.dataclass(frozen=True)
class _Widths:
    """Sizes of a token's arrays in a layer: between layers, of the keys (or values) that it keeps,
    of all products with kernels, of all intermediates. Where layers differ they are means, and
    `widest` is the largest of a layer's intermediates."""

    hidden: int
    kv: float
    dots: float
    inner: float
    widest: int

    @classmethod
    def of(cls, model: Decoder) -> _Widths:
        config = model.config
        kvs, dots, inner = zip(
            *(_of_layer(config, config.shape(i)) for i in range(config.n_layers)), strict=True
        )
        beside = config.n_layers * config.per_layer_size
        return cls(config.hidden_size, _mean(kvs), _mean(dots), _mean(inner), max(inner) + beside)

    def limits(self, model: Decoder, seq_len: int) -> dict[str, dict[str, int]]:
        config = model.config
        others = {
            "full_kv_heads": config.full_kv_heads,
            "sharing_mlp_size": config.sharing_mlp_size,
        }
        return {
            "fsdp": {"hidden_size": config.hidden_size}
            | ({"n_experts": config.n_experts} if config.n_experts else {}),
            "tensor": {
                name: getattr(config, name)
                for name in ("n_kv_heads", "n_heads", "mlp_size", "vocab_size")
            }
            | {name: size for name, size in others.items() if size},
            "sequence": {"seq_len": seq_len},
        }


def _of_layer(config: DecoderConfig, layer: LayerShape) -> tuple[int, int, int]:
    """Sizes of a token's kept keys, products and intermediates in one layer, as in `_Widths`."""
    heads, kv = config.n_heads * layer.head_dim, layer.n_kv_heads * layer.head_dim
    mlps = max(config.experts_per_token, 1)
    mlp, own = mlps * layer.mlp_size, 0 if layer.shares_kv else kv
    n_values = 1 if layer.keys_as_values else 2
    beside = config.per_layer_size
    dots = (
        heads
        + n_values * own
        + 2 * config.hidden_size
        + 2 * mlp
        + (beside + config.hidden_size if beside else 0)
    )
    inner = 2 * (heads + own) + own + (4 + 2 * mlps) * config.hidden_size + 3 * mlp + heads
    return own, dots, inner + (3 * beside + 2 * config.hidden_size if beside else 0)


def _mean(sizes: Sequence[int]) -> float:
    return sizes[0] if len({*sizes}) == 1 else sum(sizes) / len(sizes)


def _kernels(model: Decoder) -> dict[str, jax.ShapeDtypeStruct]:
    leaves = trees.flatten(model.abstract_params())
    return {
        path: leaf
        for path, leaf in leaves.items()
        if path.endswith(("/kernel", "/router", "_experts"))
    }


def _size(model: Decoder, path: str, kernel: jax.ShapeDtypeStruct) -> int:
    """Weights of a kernel that a token is multiplied with."""
    size, config = math.prod(kernel.shape), model.config
    return (
        size * config.experts_per_token // config.n_experts if path.endswith("_experts") else size
    )
