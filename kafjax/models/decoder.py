"""One decoder for the families of `families`, from Gemma 3 to OLMo 3: embed -> layers -> norm -> logits.

They differ in switches of `DecoderConfig` (`families` tells which are set where). With Gemma 3's (Gemma Team 2025,
arXiv:2503.19786) the parameters are

    params = {"embed":      {"embedding": [V, D]},
              "layers":     {"attn_norm": {"scale": [L, D]}, "attn": {"q_proj": {"kernel": [L, D, H*Dh]}, ...}, "mlp": {...}, ...},
              "final_norm": {"scale": [D]}}

and others have no norms before or after, no q/k norms, biases, experts
(`"mlp": {"router": [L, D, E], "gate_experts": [L, E, D, F], ...}`), or a `"head": {"embedding": [V, D]}` where the embedding does
not make the logits.

Dimensions: B batch, T new tokens, S cached tokens, D hidden, H query heads, K key heads, Dh head size, E experts, F inside of an
MLP, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.models.config import DecoderConfig
from kafjax.models.layers import Embedding, Projection, RMSNorm, parameter
from kafjax.models.remat import rematerialised
from kafjax.models.split import Split, random_params, split
from kafjax.ops.attention import attend, attend_fused, soft_cap
from kafjax.ops.experts import mixture, route
from kafjax.ops.linear import factors
from kafjax.ops.rope import rope_angles, rotate
from kafjax.parallel.sharding import Constrain, unconstrained

Cache = dict[str, jax.Array]
"""Keys and values of past tokens: `{"k": [L, B, S, K, Dh], "v": [L, B, S, K, Dh]}`; slot s holds position s."""


RESIDUAL = ("batch", "length", None)

_ACTIVATIONS = {"gelu_tanh": functools.partial(jax.nn.gelu, approximate=True), "silu": jax.nn.silu}


def _norm(cfg: DecoderConfig, size: int | None = None, axis: str = "embed", *, present: bool = True) -> RMSNorm | None:
    return RMSNorm(size or cfg.hidden_size, cfg.norm_eps, cfg.norm_offset, axis) if present else None


def _normed(norm: RMSNorm | None, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)


class Attention(nnx.Module):
    """Grouped-query attention, with or without an RMS norm of queries and keys, per head or over all heads, before the rotation."""

    def __init__(self, cfg: DecoderConfig, rngs: nnx.Rngs):
        D, H, K, Dh = cfg.hidden_size, cfg.n_heads, cfg.n_kv_heads, cfg.head_dim
        self.q_proj = Projection(D, H * Dh, ("embed", "heads"), bias=cfg.qkv_bias, rngs=rngs)
        self.k_proj = Projection(D, K * Dh, ("embed", "kv_heads"), bias=cfg.qkv_bias, rngs=rngs)
        self.v_proj = Projection(D, K * Dh, ("embed", "kv_heads"), bias=cfg.qkv_bias, rngs=rngs)
        self.o_proj = Projection(H * Dh, D, ("heads", "embed"), bias=cfg.o_bias, rngs=rngs)
        self.q_norm = _norm(cfg, *((H * Dh, "heads") if cfg.wide_qk_norm else (Dh, "head_dim")), present=cfg.qk_norm)
        self.k_norm = _norm(cfg, *((K * Dh, "kv_heads") if cfg.wide_qk_norm else (Dh, "head_dim")), present=cfg.qk_norm)
        self.head_dim, self.scale, self.cap, self.wide_qk_norm = Dh, cfg.attention_scale, cfg.attention_cap, cfg.wide_qk_norm

    def __call__(self, x_BxTxD, angles, growth_BxTx1x1, mask_BxTxT, past_kv, past_mask_BxTxS, constrain, attention):
        def heads(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:2], -1, self.head_dim)

        def normed(norm: Any, y: jax.Array) -> jax.Array:
            return heads(_normed(norm, y)) if self.wide_qk_norm else _normed(norm, heads(y))

        q = rotate(normed(self.q_norm, self.q_proj(x_BxTxD)), angles)
        q = constrain(q if growth_BxTx1x1 is None else q * growth_BxTx1x1.astype(q.dtype), ("batch", "length", "heads", None))
        # Every query sees keys and values of the whole row: where its tokens are split, here they are gathered.
        k = constrain(rotate(normed(self.k_norm, self.k_proj(x_BxTxD)), angles), ("batch", None, "kv_heads", None))
        v = constrain(heads(self.v_proj(x_BxTxD)), ("batch", None, "kv_heads", None))
        if past_kv is not None:
            out = attend(q, [past_kv["k"], k], [past_kv["v"], v], [past_mask_BxTxS, mask_BxTxT], self.scale, self.cap)
        elif attention == "cudnn":
            if self.cap is not None:
                raise UserError("cuDNN attention does not cap scores, as this model does; leave --attention at xla")
            out = attend_fused(q, k, v, mask_BxTxT, self.scale)
        else:
            out = attend(q, [k], [v], [mask_BxTxT], self.scale, self.cap)
        return self.o_proj(out.reshape(*x_BxTxD.shape[:2], -1)), {"k": k, "v": v}


class MLP(nnx.Module):
    """`down(activation(gate(x)) * up(x))`."""

    def __init__(self, cfg: DecoderConfig, rngs: nnx.Rngs):
        self.gate_proj = Projection(cfg.hidden_size, cfg.mlp_size, ("embed", "mlp"), rngs=rngs)
        self.up_proj = Projection(cfg.hidden_size, cfg.mlp_size, ("embed", "mlp"), rngs=rngs)
        self.down_proj = Projection(cfg.mlp_size, cfg.hidden_size, ("mlp", "embed"), rngs=rngs)
        self.activation = cfg.activation

    def __call__(self, x, constrain):
        inner = ("batch", "length", "mlp")
        return self.down_proj(_gated(constrain(self.gate_proj(x), inner), constrain(self.up_proj(x), inner), self.activation))


class Experts(nnx.Module):
    """Many MLPs, and a router that names the few of them which a token goes through."""

    def __init__(self, cfg: DecoderConfig, rngs: nnx.Rngs):
        E, D, F = cfg.n_experts, cfg.hidden_size, cfg.mlp_size
        self.router = parameter(rngs.params(), (D, E), ("embed", None), D**-0.5)
        self.gate_experts = parameter(rngs.params(), (E, D, F), ("experts", None, "mlp"), D**-0.5)
        self.up_experts = parameter(rngs.params(), (E, D, F), ("experts", None, "mlp"), D**-0.5)
        self.down_experts = parameter(rngs.params(), (E, F, D), ("experts", "mlp", None), F**-0.5)
        self.k, self.normalised, self.activation = cfg.experts_per_token, cfg.normalised_shares, cfg.activation

    def __call__(self, x, constrain):
        x_NxD = x.reshape(-1, x.shape[-1])
        shares, ids = route(x_NxD, self.router.get_value(), self.k, normalised=self.normalised)
        experts = (of.get_value() for of in (self.gate_experts, self.up_experts, self.down_experts))
        return mixture(x_NxD, shares, ids, *experts, lambda gate, up: _gated(gate, up, self.activation)).reshape(x.shape)


@functools.partial(jax.checkpoint, static_argnums=2)
def _gated(gate: jax.Array, up: jax.Array, activation: str) -> jax.Array:
    """Keeps only the two inputs for the backward pass: the pieces of the GELU are cheaper to compute again than to store."""
    return _ACTIVATIONS[activation](gate) * up


class Layer(nnx.Module):
    """Attention and MLP, each with a norm before, after, or both."""

    def __init__(self, cfg: DecoderConfig, rngs: nnx.Rngs):
        self.attn_norm, self.mlp_norm = (_norm(cfg, present=cfg.pre_norms) for _ in range(2))
        self.attn_post_norm, self.mlp_post_norm = (_norm(cfg, present=cfg.post_norms) for _ in range(2))
        self.attn = Attention(cfg, rngs)
        self.mlp = Experts(cfg, rngs) if cfg.n_experts else MLP(cfg, rngs)

    def __call__(self, x, angles, growth, mask, past_kv, past_mask, constrain, attention):
        attended, kv = self.attn(_normed(self.attn_norm, x), angles, growth, mask, past_kv, past_mask, constrain, attention)
        x = x + _normed(self.attn_post_norm, constrain(attended, RESIDUAL))
        return x + _normed(self.mlp_post_norm, constrain(self.mlp(_normed(self.mlp_norm, x), constrain), RESIDUAL)), kv


class Ends(nnx.Module):
    """The parameters before and after the layers."""

    def __init__(self, cfg: DecoderConfig, rngs: nnx.Rngs):
        self.embed = Embedding(cfg.vocab_size, cfg.hidden_size, ("vocab", "embed"), rngs=rngs)
        self.final_norm = _norm(cfg)
        if not cfg.tied:
            self.head = Embedding(cfg.vocab_size, cfg.hidden_size, ("vocab", "embed"), rngs=rngs)


@dataclasses.dataclass(frozen=True, eq=False)
class Decoder:
    """A decoder without its parameters: pure functions of `params`, a plain nested dict of arrays.

    `dtype` is the dtype of activations; kernels are cast to it where they are used. `unroll` lays the layers out one after
    another instead of scanning them: slightly faster steps on a CPU, four times the compile. `remat` says what of a layer is kept
    for the backward pass: a name in `REMAT`. `attention`, a name in `ATTENTION`, says who computes it among new tokens; over a cache it is
    always XLA. `constrain` states where activations lie; by default the compiler decides.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    unroll: bool = False
    remat: str = "none"
    attention: str = "xla"
    constrain: Constrain = unconstrained

    @functools.cached_property
    def _layer(self) -> Split:
        return split(lambda rngs: Layer(self.config, rngs), n_layers=self.config.n_layers)

    @functools.cached_property
    def _ends(self) -> Split:
        return split(lambda rngs: Ends(self.config, rngs))

    def abstract_params(self) -> trees.Tree:
        """Shapes and dtypes (float32) of the parameters."""
        return {**self._ends.abstract, "layers": self._layer.abstract}

    def axes(self) -> trees.Tree:
        """Names of the logical axes of each parameter, for the sharding rules."""
        return {**self._ends.axes, "layers": self._layer.axes}

    def init(self, key: jax.Array) -> trees.Tree:
        """Random float32 parameters; jit it with `out_shardings` to create them where they belong."""
        ends_key, layers_key = jax.random.split(key)

        def layer(k: jax.Array) -> trees.Tree:
            return random_params(lambda rngs: Layer(self.config, rngs), k)

        layers = jax.vmap(layer)(jax.random.split(layers_key, self.config.n_layers))
        return {**random_params(lambda rngs: Ends(self.config, rngs), ends_key), "layers": layers}

    def apply(self, params: trees.Tree, tokens_BxT: jax.Array) -> jax.Array:
        """Tokens int32 -> logits float32 `[B, T, V]`, each position from the ones up to it."""
        hidden_BxTxD, _ = self.hidden(params, tokens_BxT)
        return self.logits(params, hidden_BxTxD)

    def logits(self, params: trees.Tree, hidden: jax.Array) -> jax.Array:
        """Final hidden states `[.., D]` -> logits float32 `[.., V]`."""

        def product(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
            return jnp.einsum("...d,vd->...v", *pair, preferred_element_type=jnp.float32)

        return soft_cap(functools.reduce(jnp.add, map(product, factors(hidden, self.unembedding(params)))), self.config.logit_cap)

    def unembedding(self, params: trees.Tree) -> Any:
        """The leaf `[V, D]` whose product with a hidden state makes the logits, before their cap: embedding, or untied head.
        It may be a `LoRAWeight`."""
        return params["embed" if self.config.tied else "head"]["embedding"]

    def hidden(
        self,
        params: trees.Tree,
        tokens_BxT: jax.Array,
        positions_BxT: jax.Array | None = None,
        segments_BxT: jax.Array | None = None,
        past: Cache | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Final hidden states `[B, T, D]` and the keys and values of the new tokens `[L, B, T, K, Dh]`.

        Args:
          positions_BxT: int32, ascending within a segment; 0, 1, 2 ... if not given.
          segments_BxT: int32 ids of packed sequences; tokens see their own segment only.
          past: a cache, of which each row sees the slots below its first new position.
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
        masks = _masks(cfg, positions_BxT, segments_BxT)
        past_masks = None if past is None else _past_masks(cfg, positions_BxT, past["k"].shape[2])
        angles = _angles(cfg, positions_BxT)
        growth = None if cfg.query_growth is None else cfg.query_growth.at(positions_BxT)

        def layer(x, scanned):
            layer_params, sliding, rotated, layer_past = scanned

            def pick(pair: tuple[Any, Any]) -> Any:
                """Picks from a pair (for full layers, for sliding ones); where both are the same there is nothing to choose."""
                return jax.tree.map(lambda a, b: a if a is b else jnp.where(sliding, b, a), *pair)

            past_mask = None if past_masks is None else pick(past_masks)
            turn = pick(angles)
            if rotated is not None:
                turn = jax.tree.map(lambda angle, none: jnp.where(rotated, angle, none), turn, (1.0, 0.0))
            run = self._layer.module(layer_params)
            return run(x, turn, growth, pick(masks), layer_past, past_mask, self.constrain, self.attention)

        scanned = (params["layers"], jnp.array(cfg.sliding), None if cfg.rotated is None else jnp.array(cfg.rotated), past)
        x, kv = jax.lax.scan(rematerialised(layer, self.remat), x, scanned, unroll=cfg.n_layers if self.unroll else 1)
        return ends.final_norm(x), kv


def _angles(cfg: DecoderConfig, positions_BxT: jax.Array) -> tuple[Any, Any]:
    """(full, sliding) rotations; one and the same where sliding layers have no base of their own."""
    rotary_dim = cfg.rotary_dim or cfg.head_dim
    full = rope_angles(positions_BxT, rotary_dim, cfg.rope_theta, cfg.rope_factor, cfg.rope_stretch)
    if cfg.rope_theta_sliding is None:
        return full, full
    return full, rope_angles(positions_BxT, rotary_dim, cfg.rope_theta_sliding)


def _masks(cfg: DecoderConfig, positions_BxT: jax.Array, segments_BxT: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """(full, sliding) masks `[B, T, T]` among the new tokens; one and the same where all layers are of one kind."""
    T = positions_BxT.shape[1]
    causal = jnp.arange(T)[:, None] >= jnp.arange(T)[None, :]
    full = jnp.broadcast_to(causal, (positions_BxT.shape[0], T, T))
    if segments_BxT is not None:
        full = full & (segments_BxT[:, :, None] == segments_BxT[:, None, :])
    return _with_window(cfg, full, lambda: positions_BxT[:, :, None] - positions_BxT[:, None, :])


def _past_masks(cfg: DecoderConfig, positions_BxT: jax.Array, n_slots: int) -> tuple[jax.Array, jax.Array]:
    """(full, sliding) masks `[B, T, S]` over the cache: slots below the first new position of the row are filled."""
    slots = jnp.arange(n_slots)
    full = jnp.broadcast_to(slots < positions_BxT[:, :1, None], (*positions_BxT.shape, n_slots))
    return _with_window(cfg, full, lambda: positions_BxT[:, :, None] - slots)


def _with_window(cfg: DecoderConfig, full: jax.Array, distance: Callable[[], jax.Array]) -> tuple[jax.Array, jax.Array]:
    if not any(cfg.sliding):
        return full, full
    window: Any = cfg.window  # never None where a layer slides
    sliding = full & (distance() < window)
    return (sliding, sliding) if all(cfg.sliding) else (full, sliding)
