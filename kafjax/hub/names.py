"""One table per family: where a checkpoint's tensor lives in the parameter tree, and whether it is transposed on the way.

A `{i}` in a tensor's name is the layer; those tensors are stacked on the leading axis of the parameter. A Hugging Face
projection weight is `[out, in]`, ours `[in, out]`.
"""

from __future__ import annotations

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Entry:
    """`offset` is added to the stored numbers (GGUF keeps Gemma's norm scales as 1 + w)."""

    path: str
    tensor: str
    transpose: bool = False
    offset: float = 0.0


def _projections(path: str, tensor: str, names: dict[str, str], *, bias: bool = False) -> tuple[Entry, ...]:
    kernels = tuple(Entry(f"{path}/{ours}/kernel", f"{tensor}.{theirs}.weight", True) for ours, theirs in names.items())
    biases = tuple(Entry(f"{path}/{ours}/bias", f"{tensor}.{theirs}.bias") for ours, theirs in names.items())
    return kernels + biases if bias else kernels


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


GEMMA3 = (
    Entry("embed/embedding", "model.embed_tokens.weight"),
    Entry("final_norm/scale", "model.norm.weight"),
    Entry("layers/attn_norm/scale", "model.layers.{i}.input_layernorm.weight"),
    Entry("layers/attn_post_norm/scale", "model.layers.{i}.post_attention_layernorm.weight"),
    Entry("layers/mlp_norm/scale", "model.layers.{i}.pre_feedforward_layernorm.weight"),
    Entry("layers/mlp_post_norm/scale", "model.layers.{i}.post_feedforward_layernorm.weight"),
    Entry("layers/attn/q_norm/scale", "model.layers.{i}.self_attn.q_norm.weight"),
    Entry("layers/attn/k_norm/scale", "model.layers.{i}.self_attn.k_norm.weight"),
    *_projections("layers/attn", "model.layers.{i}.self_attn", _same("q_proj", "k_proj", "v_proj", "o_proj")),
    *_projections("layers/mlp", "model.layers.{i}.mlp", _same("gate_proj", "up_proj", "down_proj")),
)

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
GEMMA3_GGUF = (
    Entry("embed/embedding", "token_embd.weight"),
    *(Entry(f"{path}/scale", f"{tensor}.weight", offset=-1.0) for path, tensor in _GGUF_NORMS.items()),
    *(Entry(f"{path}/kernel", f"{tensor}.weight", True) for path, tensor in _GGUF_KERNELS.items()),
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
BERT = (
    Entry("embeddings/word/embedding", "embeddings.word_embeddings.weight"),
    Entry("embeddings/position/embedding", "embeddings.position_embeddings.weight"),
    Entry("embeddings/token_type/embedding", "embeddings.token_type_embeddings.weight"),
    *_layer_norm("embeddings/norm", "embeddings.LayerNorm"),
    *_projections("layers", "encoder.layer.{i}", _BERT_PROJECTIONS, bias=True),
    *_layer_norm("layers/attn_norm", "encoder.layer.{i}.attention.output.LayerNorm"),
    *_layer_norm("layers/mlp_norm", "encoder.layer.{i}.output.LayerNorm"),
)

# Tensors that checkpoints of a family carry and this code has no use for: mean pooling skips BERT's pooler, position ids are
# 0, 1, 2 ..., and a tied head is the embedding under another name.
UNUSED = {
    "gemma3": re.compile(r"lm_head\.weight|.*\.rotary_emb\.inv_freq"),
    "bert": re.compile(r"pooler\.dense\.(weight|bias)|embeddings\.position_ids|cls\..*"),
}
# Some writers put a prefix before every name.
PREFIX = {"gemma3": "", "bert": "bert."}
