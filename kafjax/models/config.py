"""Model shapes and switches, read from the `config.json` of a Hugging Face folder and written to
one."""

from __future__ import annotations

import dataclasses
from typing import Any

from kafjax.core.errors import UserError
from kafjax.models import families, written
from kafjax.models.family_fields import count, refuse
from kafjax.models.settings import check_settings
from kafjax.ops.rope import QueryGrowth, Stretch


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """Sizes and switches in which the layers of one decoder may differ; see `DecoderConfig`."""

    head_dim: int
    n_kv_heads: int
    mlp_size: int
    keys_as_values: bool
    shares_kv: bool


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder's shape and the switches in which the families differ. The defaults are Gemma 3's
    (Gemma Team 2025).

    Attributes:
      sliding: for each layer, whether it sees only the last `window` tokens.
      window: may be None where no layer slides.
      rotated: for each layer, whether its queries and keys turn with their positions; None if all
        do.
      rotary_dim: dimensions of a head that turn, the first ones; None for all.
      rope_theta: base of the rotary frequencies.
      rope_theta_sliding: base in sliding layers, unscaled; None where they turn as the others do.
      rope_factor: divides the frequencies: all of them, or as `rope_stretch` says.
      query_growth: what later queries are multiplied by; None for nothing.
      attention_scale: of queries times keys.
      attention_cap, logit_cap: bounds of attention scores and of logits (`ops.blockwise.soft_cap`);
        None for none.
      norm_offset: RMS norms multiply by `norm_offset + scale`.
      pre_norms: a norm before attention and MLP.
      post_norms: a norm behind attention and MLP, before the sum.
      qk_norm: queries and keys are normed: per head, or with `wide_qk_norm` over all heads
        together.
      value_norm: values are normed, too, per head and without a scale.
      full_head_dim, full_kv_heads: of layers that do not slide, where they differ from `head_dim`
        and `n_kv_heads`; else None.
      keys_as_values: layers that do not slide have no projection of values: those are the projected
        keys, before norm and rotation.
      n_sharing: number of last layers without keys and values. They take those of the last layer
        before them that slides as they do, or does not.
      sharing_mlp_size: of those layers, where it differs from `mlp_size`; else None.
      per_layer_size: width of the embeddings that each token has for each layer, and
        `per_layer_vocab` tokens; 0 for none.
      layer_scalar: a layer's output is multiplied by a number of its own, which is not trained.
      n_experts: MLPs of a layer, each of `mlp_size`, of which a token goes through
        `experts_per_token`; 0 for one MLP.
      normalised_shares: what those experts add is weighted by shares that sum to 1.
      activation: of the gate, "gelu_tanh" or "silu".
      qkv_bias, o_bias: biases of those projections.
      scale_embedding: embeddings are multiplied by sqrt(hidden_size).
      tied: the embedding also makes the logits; else the parameters have a "head".
      max_length: most positions the model was made for.
      bos_id: None in families that put no token in front.
      eos_id: written behind a text in training, and ends a reply; None where the file names none
        (`text_end` asks for it).
      also_eos_ids: end a reply, too: the end of a turn in a chat.
      family: the model_type of config.json. Nothing is computed by it: it names the form to be
        written in.
      multimodal: this is the text part of a multimodal model, whose modules adapters name as they
        lie there. It is written as a text model.

    Raises:
      UserError: a layer slides and there is no window, `sliding` or `rotated` has another length
        than `n_layers`, or a layer shares keys and values that no layer has.
    """

    vocab_size: int
    hidden_size: int
    mlp_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    sliding: tuple[bool, ...]
    window: int | None
    rotated: tuple[bool, ...] | None = None
    rotary_dim: int | None = None
    rope_theta: float = 1e6
    rope_theta_sliding: float | None = 1e4
    rope_factor: float = 1.0
    rope_stretch: Stretch | None = None
    query_growth: QueryGrowth | None = None
    attention_scale: float = 256**-0.5
    attention_cap: float | None = None
    logit_cap: float | None = None
    norm_eps: float = 1e-6
    norm_offset: float = 1.0
    pre_norms: bool = True
    post_norms: bool = True
    qk_norm: bool = True
    wide_qk_norm: bool = False
    value_norm: bool = False
    full_head_dim: int | None = None
    full_kv_heads: int | None = None
    keys_as_values: bool = False
    n_sharing: int = 0
    sharing_mlp_size: int | None = None
    per_layer_size: int = 0
    per_layer_vocab: int = 0
    layer_scalar: bool = False
    n_experts: int = 0
    experts_per_token: int = 0
    normalised_shares: bool = False
    activation: str = "gelu_tanh"
    qkv_bias: bool = False
    o_bias: bool = False
    scale_embedding: bool = True
    tied: bool = True
    max_length: int = 32768
    bos_id: int | None = 2
    eos_id: int | None = 1
    also_eos_ids: tuple[int, ...] = ()
    family: str = "gemma3_text"
    multimodal: bool = False

    def __post_init__(self) -> None:
        for name in ("sliding", "rotated"):
            if (layers := getattr(self, name)) is not None and len(layers) != self.n_layers:
                raise UserError(f"`{name}` names {len(layers)} layers, there are {self.n_layers}")
        if any(self.sliding) and self.window is None:
            raise UserError("a layer slides, and there is no window")
        own, sharing = (
            self.sliding[: self.n_layers - self.n_sharing],
            self.sliding[self.n_layers - self.n_sharing :],
        )
        if not set(sharing) <= set(own):
            kind = "sliding_attention" if set(sharing) - set(own) == {True} else "full_attention"
            raise UserError(
                f"the last {self.n_sharing} layers share keys and values, and no layer before them is of type {kind}"
            )

    def shape(self, layer: int) -> LayerShape:
        """The shape of a layer."""
        is_full, shares = not self.sliding[layer], layer >= self.n_layers - self.n_sharing
        return LayerShape(
            head_dim=(is_full and self.full_head_dim) or self.head_dim,
            n_kv_heads=(is_full and self.full_kv_heads) or self.n_kv_heads,
            mlp_size=(shares and self.sharing_mlp_size) or self.mlp_size,
            keys_as_values=is_full and self.keys_as_values,
            shares_kv=shares,
        )

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a reply, the EOS first. Raises `UserError` where none is known."""
        return (self.text_end, *self.also_eos_ids)

    @property
    def text_end(self) -> int:
        """The EOS. Raises `UserError` where none is known: only those ask who end a text or a
        reply."""
        if self.eos_id is None:
            raise UserError(
                "config.json has no 'eos_token_id', without which no text and no reply ends; add it to generation_config.json"
            )
        return self.eos_id

    def ending_with(self, token: int) -> DecoderConfig:
        """Returns the configuration of a model whose replies end with `token`, too."""
        if self.eos_id is None:
            return dataclasses.replace(self, eos_id=token)
        also = (
            self.also_eos_ids
            if token in (self.eos_id, *self.also_eos_ids)
            else (*self.also_eos_ids, token)
        )
        return dataclasses.replace(self, also_eos_ids=also)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> DecoderConfig:
        """Raises `UserError` for an unknown family, a missing key or a setting that this decoder
        does not compute."""
        return cls(**families.read(config))

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` of the family. Raises `UserError` if the switches are not set as in
        that family."""
        config = written.write(vars(self))
        read = dataclasses.replace(DecoderConfig.from_hf(config), multimodal=self.multimodal)
        for field in dataclasses.fields(self):
            if (ours := getattr(self, field.name)) != (theirs := getattr(read, field.name)):
                raise UserError(
                    f"a model with {field.name}={ours!r} is no {self.family}, which has {theirs!r}: it cannot be written"
                )
        return config


@dataclasses.dataclass(frozen=True)
class DenseConfig:
    """A dense layer behind the pooling: its folder, sizes, whether it has a bias, and its
    activation (`pooling.ACTIVATIONS`)."""

    path: str
    n_in: int
    n_out: int
    bias: bool = True
    activation: str = "tanh"


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """A BERT encoder (Devlin et al. 2018) and what makes a vector of its token states (Reimers &
    Gurevych 2019).

    Attributes:
      max_length: positions of the model. `longest`: tokens that a text may have, special ones
        included; None for all positions.
      pooling: modes of `pooling.MODES`, whose vectors are joined. `dense`: layers behind them.
        `normalise`: to length 1 at last.
      query_prompt, document_prompt: texts that stand before each query and each document.
      lower_case: texts are lower-cased before the tokenizer sees them.
      pools_prompt: the prompt's tokens are pooled, too.
    """

    vocab_size: int
    hidden_size: int
    mlp_size: int
    n_layers: int
    n_heads: int
    max_length: int = 512
    type_vocab_size: int = 2
    norm_eps: float = 1e-12
    family: str = "bert"
    pooling: tuple[str, ...] = ("mean",)
    dense: tuple[DenseConfig, ...] = ()
    normalise: bool = True
    longest: int | None = None
    lower_case: bool = False
    query_prompt: str = ""
    document_prompt: str = ""
    pools_prompt: bool = True

    @property
    def dimension(self) -> int:
        """The size of a text's vector."""
        return self.dense[-1].n_out if self.dense else self.hidden_size * len(self.pooling)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> EncoderConfig:
        """Raises `UserError` for a missing key or a setting that this encoder does not compute."""
        refuse(
            config,
            {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False},
        )
        check_settings(config)
        hidden_size, n_heads = count(config, "hidden_size"), count(config, "num_attention_heads")
        if hidden_size % n_heads:
            raise UserError(
                f"config.json: hidden_size={hidden_size} is no multiple of num_attention_heads={n_heads}"
            )
        return cls(
            vocab_size=count(config, "vocab_size"),
            hidden_size=hidden_size,
            mlp_size=count(config, "intermediate_size"),
            n_layers=count(config, "num_hidden_layers"),
            n_heads=n_heads,
            max_length=config.get("max_position_embeddings", 512),
            type_vocab_size=config.get("type_vocab_size", 2),
            norm_eps=float(config.get("layer_norm_eps", 1e-12)),
        )

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` of a BERT."""
        return {
            "model_type": self.family,
            "architectures": ["BertModel"],
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.mlp_size,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "max_position_embeddings": self.max_length,
            "type_vocab_size": self.type_vocab_size,
            "layer_norm_eps": self.norm_eps,
            "hidden_act": "gelu",
        }
