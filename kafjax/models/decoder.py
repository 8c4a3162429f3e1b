"""One decoder for the families of `families`, from Gemma 2 to OLMo 3: embed -> layers -> norm ->
logits.

They differ in switches of `DecoderConfig` (`families` tells which are set where). With Gemma 3's
(Gemma Team 2025, arXiv:2503.19786) the parameters are

    params = {"embed":      {"embedding": [V, D]},
              "layers":     {"attn_norm": {"scale": [L, D]}, "attn": {"q_proj": {"kernel": [L, D, H*Dh]}, ...}, "mlp": {...}, ...},
              "final_norm": {"scale": [D]}}

and others have no norms before or after, no q/k norms, biases, experts (`"mlp": {"router": [L, D,
E], "gate_experts": [L, E, D, F], ...}`), or a `"head": {"embedding": [V, D]}` where the embedding
does not make the logits. Where layers have several shapes, as in Gemma 4, "layers" are several such
stacks by name (`models.stacks`), and where tokens have embeddings for each layer there are
`"per_layer": {"embed": {"embedding": [V, L*P]}, "proj": ..., "norm": ...}`.

Dimensions: B batch, T new tokens, S cached tokens, D hidden, H query heads, K key heads, Dh head
size, E experts, F inside of an MLP, P embedding for one layer, V vocabulary, L layers (of a stack).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kafjax.core import trees
from kafjax.models import caches
from kafjax.models.attending import KEYS, QUERIES, attend_on, over_either
from kafjax.models.caches import Cache
from kafjax.models.config import DecoderConfig, LayerShape
from kafjax.models.layers import Embedding, Projection, RMSNorm, Scale, parameter
from kafjax.models.per_layer import PerLayerEmbedding, PerLayerInput
from kafjax.models.remat import rematerialised
from kafjax.models.sight import Sight, pick
from kafjax.models.split import Split, random_params, split
from kafjax.models.stacks import Block, Stack, blocks, joined, of_stack
from kafjax.ops.attention import kernel_for
from kafjax.ops.blockwise import soft_cap
from kafjax.ops.experts import mixture, route
from kafjax.ops.linear import dot, factors
from kafjax.ops.norms import rms_norm
from kafjax.ops.rope import rotate
from kafjax.parallel.sharding import ONE_DEVICE, Constrain

RESIDUAL = ("batch", "length", None)

_ACTIVATIONS = {"gelu_tanh": functools.partial(jax.nn.gelu, approximate=True), "silu": jax.nn.silu}


def _norm(
    cfg: DecoderConfig, size: int | None = None, axis: str = "embed", *, present: bool = True
) -> RMSNorm | None:
    return (
        RMSNorm(size or cfg.hidden_size, cfg.norm_eps, cfg.norm_offset, axis) if present else None
    )


def _normed(norm: RMSNorm | None, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)


class Attention(nnx.Module):
    """Grouped-query attention, with or without an RMS norm of queries and keys, per head or over
    all heads, before the rotation."""

    def __init__(self, cfg: DecoderConfig, shape: LayerShape, rngs: nnx.Rngs):
        D, H, K, Dh = cfg.hidden_size, cfg.n_heads, shape.n_kv_heads, shape.head_dim
        self.q_proj = Projection(D, H * Dh, ("embed", "heads"), bias=cfg.qkv_bias, rngs=rngs)
        if not shape.shares_kv:
            self.k_proj = Projection(D, K * Dh, ("embed", "kv_heads"), bias=cfg.qkv_bias, rngs=rngs)
            if not shape.keys_as_values:
                self.v_proj = Projection(
                    D, K * Dh, ("embed", "kv_heads"), bias=cfg.qkv_bias, rngs=rngs
                )
            self.k_norm = _norm(
                cfg,
                *((K * Dh, "kv_heads") if cfg.wide_qk_norm else (Dh, "head_dim")),
                present=cfg.qk_norm,
            )
        self.o_proj = Projection(H * Dh, D, ("heads", "embed"), bias=cfg.o_bias, rngs=rngs)
        self.q_norm = _norm(
            cfg, *((H * Dh, "heads") if cfg.wide_qk_norm else (Dh, "head_dim")), present=cfg.qk_norm
        )
        self.head_dim, self.scale, self.cap, self.wide_qk_norm = (
            Dh,
            cfg.attention_scale,
            cfg.attention_cap,
            cfg.wide_qk_norm,
        )
        self.shape, self.value_eps = shape, cfg.norm_eps if cfg.value_norm else None

    def __call__(
        self,
        x_BxTxD,
        angles,
        growth_BxTx1x1,
        shared_kv,
        constrain,
        attend,
    ):
        def heads(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:2], -1, self.head_dim)

        def normed(norm: Any, y: jax.Array) -> jax.Array:
            return heads(_normed(norm, y)) if self.wide_qk_norm else _normed(norm, heads(y))

        q = rotate(normed(self.q_norm, self.q_proj(x_BxTxD)), angles)
        q = constrain(
            q if growth_BxTx1x1 is None else q * growth_BxTx1x1.astype(q.dtype),
            QUERIES,
        )
        if self.shape.shares_kv:
            k, v = shared_kv["k"], shared_kv["v"]
        else:
            projected = self.k_proj(x_BxTxD)
            k = constrain(rotate(normed(self.k_norm, projected), angles), KEYS)
            v = heads(projected if self.shape.keys_as_values else self.v_proj(x_BxTxD))
            v = (
                v
                if self.value_eps is None
                else rms_norm(v, jnp.float32(1), self.value_eps, offset=0.0)
            )
            v = constrain(v, KEYS)
        out = attend(q, k, v, scale=self.scale, cap=self.cap)
        return self.o_proj(out.reshape(*x_BxTxD.shape[:2], -1)), None if self.shape.shares_kv else {
            "k": k,
            "v": v,
        }


class MLP(nnx.Module):
    """`down(activation(gate(x)) * up(x))`."""

    def __init__(self, cfg: DecoderConfig, shape: LayerShape, rngs: nnx.Rngs):
        self.gate_proj = Projection(cfg.hidden_size, shape.mlp_size, ("embed", "mlp"), rngs=rngs)
        self.up_proj = Projection(cfg.hidden_size, shape.mlp_size, ("embed", "mlp"), rngs=rngs)
        self.down_proj = Projection(shape.mlp_size, cfg.hidden_size, ("mlp", "embed"), rngs=rngs)
        self.activation = cfg.activation

    def __call__(self, x, constrain):
        inner = ("batch", "length", "mlp")
        return self.down_proj(
            _gated(
                constrain(self.gate_proj(x), inner),
                constrain(self.up_proj(x), inner),
                self.activation,
            )
        )


class Experts(nnx.Module):
    """Many MLPs, and a router that names the few of them which a token goes through."""

    def __init__(self, cfg: DecoderConfig, rngs: nnx.Rngs):
        E, D, F = cfg.n_experts, cfg.hidden_size, cfg.mlp_size
        self.router = parameter(rngs.params(), (D, E), ("embed", None), D**-0.5)
        self.gate_experts = parameter(rngs.params(), (E, D, F), ("experts", None, "mlp"), D**-0.5)
        self.up_experts = parameter(rngs.params(), (E, D, F), ("experts", None, "mlp"), D**-0.5)
        self.down_experts = parameter(rngs.params(), (E, F, D), ("experts", "mlp", None), F**-0.5)
        self.k, self.normalised, self.activation = (
            cfg.experts_per_token,
            cfg.normalised_shares,
            cfg.activation,
        )

    def __call__(self, x, constrain):
        x_NxD = x.reshape(-1, x.shape[-1])
        shares, ids = route(x_NxD, self.router.get_value(), self.k, normalised=self.normalised)
        experts = (of.get_value() for of in (self.gate_experts, self.up_experts, self.down_experts))
        return mixture(
            x_NxD, shares, ids, *experts, lambda gate, up: _gated(gate, up, self.activation)
        ).reshape(x.shape)


@functools.partial(jax.checkpoint, static_argnums=2)
def _gated(gate: jax.Array, up: jax.Array, activation: str) -> jax.Array:
    """Computes in float32 and rounds once. Keeps only the two inputs for the backward pass: the
    pieces of the GELU are cheaper to compute again than to store."""
    inner = _ACTIVATIONS[activation](gate.astype(jnp.float32)) * up.astype(jnp.float32)
    return inner.astype(gate.dtype)


class Layer(nnx.Module):
    """Attention and MLP, each with a norm before, after, or both; then what its tokens have for
    this layer alone, and a factor."""

    def __init__(self, cfg: DecoderConfig, shape: LayerShape, rngs: nnx.Rngs):
        self.attn_norm, self.mlp_norm = (_norm(cfg, present=cfg.pre_norms) for _ in range(2))
        self.attn_post_norm, self.mlp_post_norm = (
            _norm(cfg, present=cfg.post_norms) for _ in range(2)
        )
        self.attn = Attention(cfg, shape, rngs)
        self.mlp = Experts(cfg, rngs) if cfg.n_experts else MLP(cfg, shape, rngs)
        self.per_layer = PerLayerInput(cfg, rngs) if cfg.per_layer_size else None
        self.layer_scalar = Scale() if cfg.layer_scalar else None
        self.activation = _ACTIVATIONS[cfg.activation]

    def __call__(
        self,
        x,
        angles,
        growth,
        shared_kv,
        per_layer_BxTxP,
        constrain,
        attend,
    ):
        normed = _normed(self.attn_norm, x)
        attended, kv = self.attn(normed, angles, growth, shared_kv, constrain, attend)
        x = x + _normed(self.attn_post_norm, constrain(attended, RESIDUAL))
        x = x + _normed(
            self.mlp_post_norm, constrain(self.mlp(_normed(self.mlp_norm, x), constrain), RESIDUAL)
        )
        if self.per_layer is not None:
            x = x + constrain(self.per_layer(x, per_layer_BxTxP, self.activation), RESIDUAL)
        return (x if self.layer_scalar is None else self.layer_scalar(x)), kv


class Ends(nnx.Module):
    """The parameters before and after the layers."""

    def __init__(self, cfg: DecoderConfig, rngs: nnx.Rngs):
        self.embed = Embedding(cfg.vocab_size, cfg.hidden_size, ("vocab", "embed"), rngs=rngs)
        self.final_norm = _norm(cfg)
        if cfg.per_layer_size:
            self.per_layer = PerLayerEmbedding(cfg, rngs)
        if not cfg.tied:
            self.head = Embedding(cfg.vocab_size, cfg.hidden_size, ("vocab", "embed"), rngs=rngs)


@dataclasses.dataclass(frozen=True, eq=False)
class Decoder:
    """A decoder without its parameters: pure functions of `params`, a plain nested dict of arrays.

    `dtype` is the dtype of activations; kernels are cast to it where they are used. `unroll` lays
    the layers out one after another instead of scanning them: slightly faster steps on a CPU, four
    times the compile. `remat` says what of a layer is kept for the backward pass: a name in
    `REMAT`. `attention`, a name in `ATTENTION`, says who computes it among new tokens; over a cache
    it is always XLA. `constrain` states where activations lie; by default there is one device.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    unroll: bool = False
    remat: str = "none"
    attention: str = "auto"
    constrain: Constrain = ONE_DEVICE

    @functools.cached_property
    def _blocks(self) -> tuple[Block, ...]:
        return blocks(self.config)

    @functools.cached_property
    def _splits(self) -> dict[str, Split]:
        """The module of each stack, by its name."""
        return {
            stack.name: split(
                functools.partial(Layer, self.config, stack.shape), len(stack.numbers)
            )
            for stack in self._stacks
        }

    @property
    def _stacks(self) -> tuple[Stack, ...]:
        return tuple(itertools.chain.from_iterable(self._blocks))

    @functools.cached_property
    def _ends(self) -> Split:
        return split(lambda rngs: Ends(self.config, rngs))

    def abstract_params(self) -> trees.Tree:
        """Shapes and dtypes (float32) of the parameters."""
        return {
            **self._ends.abstract,
            "layers": joined({name: made.abstract for name, made in self._splits.items()}),
        }

    def axes(self) -> trees.Tree:
        """Names of the logical axes of each parameter, for the sharding rules."""
        return {
            **self._ends.axes,
            "layers": joined({name: made.axes for name, made in self._splits.items()}),
        }

    def init(self, key: jax.Array) -> trees.Tree:
        """Random float32 parameters; jit it with `out_shardings` to create them where they
        belong."""
        ends_key, layers_key = jax.random.split(key)
        layer_keys = jax.random.split(layers_key, self.config.n_layers)

        def layers(stack: Stack) -> trees.Tree:
            draw = functools.partial(
                random_params, functools.partial(Layer, self.config, stack.shape)
            )
            return jax.vmap(draw)(layer_keys[np.array(stack.numbers)])

        ends = random_params(lambda rngs: Ends(self.config, rngs), ends_key)
        return {**ends, "layers": joined({stack.name: layers(stack) for stack in self._stacks})}

    def cache_shapes(self, rows: int, slots: int) -> Cache:
        """Shapes of a cache for `slots` positions, in the dtype of activations."""
        return caches.shapes(self.config, rows, slots, self.dtype)

    def apply(self, params: trees.Tree, tokens_BxT: jax.Array) -> jax.Array:
        """Tokens int32 -> logits float32 `[B, T, V]`, each position from the ones up to it."""
        hidden_BxTxD, _ = self.hidden(params, tokens_BxT)
        return self.logits(params, hidden_BxTxD)

    def logits(self, params: trees.Tree, hidden: jax.Array) -> jax.Array:
        """Final hidden states `[.., D]` -> logits float32 `[.., V]`."""

        products = (dot(x, table, 1) for x, table in factors(hidden, self.unembedding(params)))
        return soft_cap(functools.reduce(jnp.add, products), self.config.logit_cap)

    def unembedding(self, params: trees.Tree) -> Any:
        """The leaf `[V, D]` whose product with a hidden state makes the logits, before their cap:
        embedding, or untied head. It may be a `LoRAWeight`."""
        return params["embed" if self.config.tied else "head"]["embedding"]

    def hidden(
        self,
        params: trees.Tree,
        tokens_BxT: jax.Array,
        positions_BxT: jax.Array | None = None,
        segments_BxT: jax.Array | None = None,
        past: Cache | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Final hidden states `[B, T, D]` and the keys and values of the new tokens, `[L, B, T, K,
        Dh]` in the structure of a cache.

        Args:
          positions_BxT: int32, each one above the last within a segment; 0, 1, 2 ... if not given.
          segments_BxT: int32 ids of packed sequences; tokens see their own segment only. Not with a
            cache.
          past: a cache (`models.caches`), of which each row sees what lies before its first new
            position.
        """
        cfg = self.config
        B, T = tokens_BxT.shape
        if positions_BxT is None:
            positions_BxT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        ends = self._ends.module({name: params[name] for name in self._ends.abstract})
        x = ends.embed(tokens_BxT).astype(self.dtype)
        if cfg.scale_embedding:
            x = x * jnp.sqrt(jnp.float32(cfg.hidden_size)).astype(self.dtype)
        x = self.constrain(x, RESIDUAL)
        sight = Sight.of(cfg, positions_BxT, segments_BxT)
        per_layer_LxBxTxP = ends.per_layer(tokens_BxT, x) if cfg.per_layer_size else None
        new: dict[str, Any] = {}
        # by whether they slide: past and new keys and values of the last layer that has its own
        shared: dict[bool, Any] = {}
        for block in self._blocks:
            x, kvs = self._run(block, params["layers"], x, sight, per_layer_LxBxTxP, past, shared)
            new |= {name: kv for name, kv in kvs.items() if kv is not None}
            for stack in (stack for stack in block if cfg.n_sharing and stack.name in new):
                both = of_stack(past, stack.name), new[stack.name]
                shared[cfg.sliding[stack.numbers.start]] = jax.tree.map(lambda leaf: leaf[-1], both)
        return ends.final_norm(x), joined(
            {s.name: caches.by_kind(cfg, s, new[s.name]) for s in self._stacks if s.name in new}
        )

    def _run(
        self,
        block: Block,
        layers: trees.Tree,
        x_BxTxD: jax.Array,
        sight: Sight,
        per_layer_LxBxTxP: jax.Array | None,
        past: Cache | None,
        shared: dict[bool, Any],
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Runs the layers of a block, one scan over its periods. Returns the state behind them, and
        each stack's new keys and values."""
        cfg = self.config

        def scanned(stack: Stack) -> tuple[Any, ...]:
            rows = slice(stack.numbers.start, stack.numbers.stop, stack.numbers.step)
            flags = [
                None if of_layers is None else jnp.array(of_layers[rows])
                for of_layers in (cfg.sliding, cfg.rotated, caches.within_kind(cfg))
            ]
            vectors = None if per_layer_LxBxTxP is None else per_layer_LxBxTxP[rows]
            own_past = None if caches.is_mixed(cfg, stack) else of_stack(past, stack.name)
            return of_stack(layers, stack.name), *flags, own_past, vectors

        def layer(stack: Stack, x, scanned):
            layer_params, sliding, rotated, number, layer_past, vectors_BxTxP = scanned
            kinds = {cfg.sliding[i] for i in stack.numbers}
            kind = kinds.pop() if len(kinds) == 1 else sliding
            layer_past, shared_kv = (
                shared[cfg.sliding[stack.numbers.start]]
                if stack.shape.shares_kv
                else (layer_past, None)
            )
            turn = pick(sight.angles, kind)
            if rotated is not None:
                turn = jax.tree.map(
                    lambda angle, none: jnp.where(rotated, angle, none), turn, (1.0, 0.0)
                )
            attend = functools.partial(
                attend_on,
                self.constrain,
                segments_BxT=sight.segments_BxT,
                window=cfg.window,
                kernel=kernel_for(self.attention, self.constrain.platform),
            )
            if past is not None and caches.is_mixed(cfg, stack):
                attend = functools.partial(
                    over_either, attend, sight, of_stack(past, stack.name), number, sliding
                )
            else:
                attend = functools.partial(attend, past=sight.past(layer_past), sliding=kind)
            run = self._splits[stack.name].module(layer_params)
            return run(
                x,
                turn,
                sight.growth,
                shared_kv,
                vectors_BxTxP,
                self.constrain,
                attend,
            )

        runs = {
            stack.name: rematerialised(functools.partial(layer, stack), self.remat)
            for stack in block
        }

        def period(x, of_stacks):
            kvs = {}
            for name, run in runs.items():
                x, kvs[name] = run(x, of_stacks[name])
            return x, kvs

        n_periods = len(block[0].numbers)
        stacked = {stack.name: scanned(stack) for stack in block}
        return jax.lax.scan(period, x_BxTxD, stacked, unroll=n_periods if self.unroll else 1)
