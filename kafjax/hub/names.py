"""One table per family: where a checkpoint's tensor lives in the parameter tree, and whether it is
transposed on the way.

A `{i}` in a tensor's name is the layer; those tensors are stacked on the leading axis of the
parameter, or of several where layers are of several stacks (`core.stacks`): an entry's path is then
the common one. A Hugging Face projection weight is `[out, in]`, ours `[in, out]`. Several entries
may name one tensor: it holds them one after another.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping
from typing import Any

from kafjax.core import stacks, trees


@dataclasses.dataclass(frozen=True)
class Entry:
    """`offset` is added to the stored numbers (GGUF keeps Gemma's norm scales as 1 + w)."""

    path: str
    tensor: str
    transpose: bool = False
    offset: float = 0.0


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a stored tensor: its rows `start` to `stop` are `parameter[index]` of the entry's
    parameter."""

    entry: Entry
    index: tuple[int, ...]
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows `start` to `stop` of a joined tensor, and a name for them."""

    name: str
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Table:
    """The tensors of a family.

    Attributes:
      entries: of all its models; one of them uses those whose path it has (`of`).
      unused: names that checkpoints of the family carry and this code has no use for.
      idle: names of `entries` that they may also carry where this model has no such parameter.
      renamed: how some writers' names become those of `entries`: what is found of the pattern is
        replaced.
    """

    entries: tuple[Entry, ...]
    unused: re.Pattern[str] = re.compile("(?!)")
    idle: re.Pattern[str] = re.compile("(?!)")
    renamed: tuple[tuple[str, str], ...] = ()

    def of(self, params: Mapping[str, Any]) -> tuple[Entry, ...]:
        """The entries of the model that has these parameters (arrays or abstract), once for each
        stack."""
        stacked: dict[str, list[str]] = {}
        for path in trees.flatten(params):
            stacked.setdefault(stacks.common(path), []).append(path)
        return tuple(
            dataclasses.replace(entry, path=path)
            for entry in self.entries
            for path in stacked.get(entry.path, ())
        )

    def pieces(self, params: Mapping[str, Any]) -> dict[str, tuple[Piece, ...]]:
        """Every tensor of that model by name, as the pieces that it holds, in order."""
        flat, found = trees.flatten(params), {}
        for entry in self.of(params):
            shape, stacked = (
                flat[entry.path].shape,
                [marker for marker in ("{i}", "{e}") if marker in entry.tensor],
            )
            n_rows = shape[-1] if entry.transpose else shape[len(stacked)]
            for index in itertools.product(*map(range, shape[: len(stacked)])):
                name = entry.tensor
                for marker, i in zip(stacked, index, strict=True):
                    number = stacks.numbers(entry.path, shape[0])[i] if marker == "{i}" else i
                    name = name.replace(marker, str(number))
                before = found.get(name, ())
                start = before[-1].stop if before else 0
                found[name] = (*before, Piece(entry, index, start, start + n_rows))
        return found

    def tensors(self, params: Mapping[str, Any]) -> dict[str, tuple[Entry, int | None]]:
        """Every tensor but those of experts by name: its entry, and its row in the parameter (None
        in one that is not stacked).

        A part of a joined tensor has a name of its own, with our name of the projection:
        `model.layers.0.self_attn.q_proj.weight`.
        """
        found = {}
        for name, pieces in self.pieces(params).items():
            for piece in pieces:
                if not piece.entry.path.endswith(("router", "_experts")):
                    layer = piece.index[0] if piece.index else None
                    found[name if len(pieces) == 1 else _part_name(name, piece)] = (
                        piece.entry,
                        layer,
                    )
        return found

    def joined(self, params: Mapping[str, Any]) -> dict[str, tuple[Part, ...]]:
        """Tensors that hold several parameters: their parts, by the names of `tensors`."""
        several = {name: pieces for name, pieces in self.pieces(params).items() if len(pieces) > 1}
        return {
            name: tuple(Part(_part_name(name, p), p.start, p.stop) for p in pieces)
            for name, pieces in several.items()
        }

    def canonical(self, name: str) -> str:
        for pattern, replacement in self.renamed:
            name = re.sub(pattern, replacement, name)
        return name


def in_multimodal(name: str) -> str:
    """A text model's tensor as the multimodal model around it names it: `model.norm.weight` ->
    `model.language_model.norm.weight`."""
    return re.sub(r"^model\.", "model.language_model.", name)


def _part_name(name: str, piece: Piece) -> str:
    block, _, kind = name.rsplit(".", 2)
    return f"{block}.{piece.entry.path.split('/')[-2]}.{kind}"


def _projections(path: str, tensor: str, names: dict[str, str]) -> tuple[Entry, ...]:
    kernels = tuple(
        Entry(f"{path}/{ours}/kernel", f"{tensor}.{theirs}.weight", True)
        for ours, theirs in names.items()
    )
    return kernels + tuple(
        Entry(f"{path}/{ours}/bias", f"{tensor}.{theirs}.bias") for ours, theirs in names.items()
    )


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def _scales(names: dict[str, str]) -> tuple[Entry, ...]:
    return tuple(
        Entry(f"layers/{path}/scale", f"model.layers.{{i}}.{tensor}.weight")
        for path, tensor in names.items()
    )


_QKVO, _GATED = (
    _same("q_proj", "k_proj", "v_proj", "o_proj"),
    _same("gate_proj", "up_proj", "down_proj"),
)


def _decoder(attn: dict[str, str] = _QKVO, mlp: dict[str, str] = _GATED) -> tuple[Entry, ...]:
    """Lists the tensors that the families have in common; `attn` and `mlp` are projections by our
    name and theirs."""
    return (
        Entry("embed/embedding", "model.embed_tokens.weight"),
        Entry("head/embedding", "lm_head.weight"),
        Entry("final_norm/scale", "model.norm.weight"),
        *_scales(
            {
                "attn_norm": "input_layernorm",
                "attn/q_norm": "self_attn.q_norm",
                "attn/k_norm": "self_attn.k_norm",
            }
        ),
        *_projections("layers/attn", "model.layers.{i}.self_attn", attn),
        *_projections("layers/mlp", "model.layers.{i}.mlp", mlp),
    )


_GEMMA_NORMS = {
    "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
# A head in the file of a tied model is the embedding under another name.
_OF_MULTIMODAL: dict[str, Any] = {
    "unused": re.compile(
        r"lm_head\.weight|.*\.rotary_emb\.inv_freq|(model\.)?(vision_tower|multi_modal_projector)\..*"
    ),
    "renamed": (
        (r"^(language_model\.model|model\.language_model)\.", "model."),
        (r"^language_model\.lm_head\.", "lm_head."),
    ),
}
GEMMA3 = Table(entries=(*_decoder(), *_scales(_GEMMA_NORMS)), **_OF_MULTIMODAL)
_GEMMA4_NORMS = {**_GEMMA_NORMS, "per_layer/norm": "post_per_layer_input_norm"}
_PER_LAYER = {"gate": "per_layer_input_gate", "proj": "per_layer_projection"}
GEMMA4 = Table(
    entries=(
        *_decoder(),
        *_scales(_GEMMA4_NORMS),
        *(
            Entry(f"layers/per_layer/{ours}/kernel", f"model.layers.{{i}}.{theirs}.weight", True)
            for ours, theirs in _PER_LAYER.items()
        ),
        Entry("layers/layer_scalar/scale", "model.layers.{i}.layer_scalar"),
        Entry("per_layer/embed/embedding", "model.embed_tokens_per_layer.weight"),
        Entry("per_layer/proj/kernel", "model.per_layer_model_projection.weight", True),
        Entry("per_layer/norm/scale", "model.per_layer_projection_norm.weight"),
    ),
    unused=re.compile(
        rf"{_OF_MULTIMODAL['unused'].pattern}|(model\.)?(audio_tower|embed_vision|embed_audio)\..*"
    ),
    # of layers that share those of others
    idle=re.compile(r"model\.layers\.\d+\.self_attn\.[kv]_(proj|norm)\.weight"),
    renamed=_OF_MULTIMODAL["renamed"],
)
_NOTHING_NEW = re.compile(r"lm_head\.weight|.*\.rotary_emb\.inv_freq")
_LLAMA_NORMS = _scales({"mlp_norm": "post_attention_layernorm"})
LLAMA = Table(entries=(*_decoder(), *_LLAMA_NORMS), unused=_NOTHING_NEW)
MISTRAL = Table(entries=LLAMA.entries, **_OF_MULTIMODAL)
_PHI_QKVO = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "o_proj": "o_proj"}
_PHI_GATED = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
PHI3 = Table(entries=(*_decoder(_PHI_QKVO, _PHI_GATED), *_LLAMA_NORMS), unused=_NOTHING_NEW)


def _experts(block: str, names: dict[str, str]) -> tuple[Entry, ...]:
    """A router, and the projections of each expert `{e}`, by our name and theirs."""
    kernels = (
        Entry(f"layers/mlp/{ours}", f"{block}.experts.{{e}}.{theirs}.weight", True)
        for ours, theirs in names.items()
    )
    return Entry("layers/mlp/router", f"{block}.gate.weight", True), *kernels


_QWEN3_EXPERTS = {"gate_experts": "gate_proj", "up_experts": "up_proj", "down_experts": "down_proj"}
_MIXTRAL_EXPERTS = {"gate_experts": "w1", "up_experts": "w3", "down_experts": "w2"}
QWEN3_MOE = Table(
    entries=(*LLAMA.entries, *_experts("model.layers.{i}.mlp", _QWEN3_EXPERTS)), unused=_NOTHING_NEW
)
MIXTRAL = Table(
    entries=(*LLAMA.entries, *_experts("model.layers.{i}.block_sparse_moe", _MIXTRAL_EXPERTS)),
    unused=_NOTHING_NEW,
)
_OLMO_NORMS = {
    "attn_post_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
OLMO = Table(entries=(*_decoder(), *_scales(_OLMO_NORMS)), unused=_NOTHING_NEW)

_GGUF_NORMS = {
    "final_norm": "output_norm",
    "layers/attn_norm": "blk.{i}.attn_norm",
    "layers/attn_post_norm": "blk.{i}.post_attention_norm",
    "layers/mlp_norm": "blk.{i}.ffn_norm",
    "layers/mlp_post_norm": "blk.{i}.post_ffw_norm",
    "layers/attn/q_norm": "blk.{i}.attn_q_norm",
    "layers/attn/k_norm": "blk.{i}.attn_k_norm",
}
_GGUF_KERNELS = {
    "layers/attn/q_proj": "blk.{i}.attn_q",
    "layers/attn/k_proj": "blk.{i}.attn_k",
    "layers/attn/v_proj": "blk.{i}.attn_v",
    "layers/attn/o_proj": "blk.{i}.attn_output",
    "layers/mlp/gate_proj": "blk.{i}.ffn_gate",
    "layers/mlp/up_proj": "blk.{i}.ffn_up",
    "layers/mlp/down_proj": "blk.{i}.ffn_down",
}
GEMMA3_GGUF = Table(
    entries=(
        Entry("embed/embedding", "token_embd.weight"),
        *(
            Entry(f"{path}/scale", f"{tensor}.weight", offset=-1.0)
            for path, tensor in _GGUF_NORMS.items()
        ),
        *(
            Entry(f"{path}/kernel", f"{tensor}.weight", True)
            for path, tensor in _GGUF_KERNELS.items()
        ),
    )
)


def _layer_norm(path: str, tensor: str) -> tuple[Entry, ...]:
    return Entry(f"{path}/scale", f"{tensor}.weight"), Entry(f"{path}/bias", f"{tensor}.bias")


_BERT_PROJECTIONS = {
    "q_proj": "attention.self.query",
    "k_proj": "attention.self.key",
    "v_proj": "attention.self.value",
    "o_proj": "attention.output.dense",
    "up_proj": "intermediate.dense",
    "down_proj": "output.dense",
}
# Mean pooling skips BERT's pooler; position ids are 0, 1, 2 ...
BERT = Table(
    entries=(
        Entry("embeddings/word/embedding", "embeddings.word_embeddings.weight"),
        Entry("embeddings/position/embedding", "embeddings.position_embeddings.weight"),
        Entry("embeddings/token_type/embedding", "embeddings.token_type_embeddings.weight"),
        *_layer_norm("embeddings/norm", "embeddings.LayerNorm"),
        *_projections("layers", "encoder.layer.{i}", _BERT_PROJECTIONS),
        *_layer_norm("layers/attn_norm", "encoder.layer.{i}.attention.output.LayerNorm"),
        *_layer_norm("layers/mlp_norm", "encoder.layer.{i}.output.LayerNorm"),
    ),
    unused=re.compile(r"pooler\.dense\.(weight|bias)|embeddings\.position_ids|cls\..*"),
    renamed=((r"^bert\.", ""),),
)

CROSS_ENCODER = Table(
    entries=(
        *BERT.entries,
        Entry("pooler/kernel", "pooler.dense.weight", True),
        Entry("pooler/bias", "pooler.dense.bias"),
        Entry("classifier/kernel", "classifier.weight", True),
        Entry("classifier/bias", "classifier.bias"),
    ),
    unused=re.compile(r"embeddings\.position_ids"),
    renamed=BERT.renamed,
)

TABLES = {
    **{"gemma4_text": GEMMA4, "gemma3_text": GEMMA3, "gemma2": GEMMA3},
    **{"llama": LLAMA, "smollm3": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA},
    **{"mistral": MISTRAL, "ministral3": MISTRAL, "phi3": PHI3, "olmo2": OLMO, "olmo3": OLMO},
    **{"qwen3_moe": QWEN3_MOE, "mixtral": MIXTRAL, "bert": BERT},
}
"""By the model_type of `config.json`."""
