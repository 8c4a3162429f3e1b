"""Published decoders by name, for planning: what fits where, and what a step costs, before any
weight is fetched.

The numbers are those of the models' own `config.json` files; the test compares the parameter counts
with the published ones. The larger Gemma 3 and the Gemma 4 come with towers for images and sound,
of which nothing is here; the vocabulary of the former has 64 more rows for images.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from kafjax.core.errors import UserError, nearest
from kafjax.models.config import DecoderConfig
from kafjax.ops.rope import Llama3Stretch, Proportional, YarnStretch


def named(name: str) -> DecoderConfig:
    """`CONFIGS[name]`. Raises `UserError` with the nearest known name."""
    if name not in CONFIGS:
        raise UserError(f"no published model '{name}'. {nearest(name, CONFIGS)}")
    return CONFIGS[name]


def _gemma3(*sizes: int, window: int, vocab_size: int = 262_144, **changes: Any) -> DecoderConfig:
    hidden_size, mlp_size, n_layers, n_heads, n_kv_heads = sizes
    sliding = tuple((i + 1) % 6 != 0 for i in range(n_layers))
    gemma = DecoderConfig(
        vocab_size, hidden_size, mlp_size, n_layers, n_heads, n_kv_heads, 256, sliding, window
    )
    return dataclasses.replace(gemma, **changes)


def _gemma4(*sizes: int, pattern: int = 6, **switches: Any) -> DecoderConfig:
    hidden_size, mlp_size, n_layers, n_heads, n_kv_heads = sizes
    fields: dict[str, Any] = {
        **{
            "sliding": tuple((i + 1) % pattern != 0 for i in range(n_layers)),
            "window": 512,
            "full_head_dim": 512,
        },
        **{
            "rope_stretch": Proportional(0.25),
            "attention_scale": 1.0,
            "logit_cap": 30.0,
            "norm_offset": 0.0,
            "value_norm": True,
        },
        **{
            "layer_scalar": True,
            "max_length": 131_072,
            "also_eos_ids": (106,),
            "family": "gemma4_text",
            **switches,
        },
    }
    return DecoderConfig(
        262_144, hidden_size, mlp_size, n_layers, n_heads, n_kv_heads, 256, **fields
    )


def _gemma2(*sizes: int, **switches: Any) -> DecoderConfig:
    hidden_size, mlp_size, n_layers, n_heads, n_kv_heads = sizes
    fields: dict[str, Any] = {
        **{
            "sliding": tuple(i % 2 == 0 for i in range(n_layers)),
            "window": 4096,
            "rope_theta": 1e4,
            "rope_theta_sliding": None,
        },
        **{
            "qk_norm": False,
            "attention_cap": 50.0,
            "logit_cap": 30.0,
            "max_length": 8192,
            "family": "gemma2",
            **switches,
        },
    }
    return DecoderConfig(256_000, hidden_size, mlp_size, n_layers, n_heads, n_kv_heads, **fields)


def _plain(
    family: str, vocab_size: int, *sizes: int, head_dim: int = 128, **switches: Any
) -> DecoderConfig:
    hidden_size, mlp_size, n_layers, n_heads, n_kv_heads = sizes
    fields: dict[str, Any] = {
        "sliding": (False,) * n_layers,
        "window": None,
        "rope_theta_sliding": None,
        "attention_scale": head_dim**-0.5,
        "norm_offset": 0.0,
        "post_norms": False,
        "qk_norm": False,
        "activation": "silu",
        "scale_embedding": False,
        "tied": False,
        "family": family,
        **switches,
    }
    return DecoderConfig(
        vocab_size, hidden_size, mlp_size, n_layers, n_heads, n_kv_heads, head_dim, **fields
    )


def _llama3(*sizes: int, factor: float = 8.0, **switches: Any) -> DecoderConfig:
    stretch = Llama3Stretch(low=1.0, high=4.0, original_length=8192)
    rope: dict[str, Any] = {
        "rope_theta": 5e5,
        "rope_factor": factor,
        "rope_stretch": stretch,
        "max_length": 131_072,
    }
    return _plain(
        "llama", 128_256, *sizes, **rope, norm_eps=1e-5, bos_id=128_000, eos_id=128_001, **switches
    )


def _qwen3(*sizes: int, **switches: Any) -> DecoderConfig:
    return _plain(
        "qwen3",
        151_936,
        *sizes,
        qk_norm=True,
        max_length=40_960,
        bos_id=151_643,
        eos_id=151_645,
        **switches,
    )


def _qwen25(
    vocab_size: int, *sizes: int, head_dim: int, max_length: int, **switches: Any
) -> DecoderConfig:
    ids = {"bos_id": 151_643, "eos_id": 151_643}
    return _plain(
        "qwen2",
        vocab_size,
        *sizes,
        head_dim=head_dim,
        max_length=max_length,
        qkv_bias=True,
        **ids,
        **switches,
    )


def _olmo(family: str, vocab_size: int, *sizes: int, **switches: Any) -> DecoderConfig:
    norms = {"pre_norms": False, "post_norms": True, "qk_norm": True, "wide_qk_norm": True}
    return _plain(
        family, vocab_size, *sizes, rope_theta=5e5, bos_id=None, eos_id=100_257, **norms, **switches
    )


_PER_LAYER = {"per_layer_size": 256, "per_layer_vocab": 262_144}
_MULTIMODAL = {
    "window": 1024,
    "vocab_size": 262_208,
    "rope_factor": 8.0,
    "max_length": 131_072,
    "also_eos_ids": (106,),
}

# Sizes are hidden, MLP, layers, query heads, key heads.
CONFIGS: dict[str, DecoderConfig] = {
    "gemma4-e2b": _gemma4(
        1536, 6144, 35, 8, 1, pattern=5, n_sharing=20, sharing_mlp_size=12_288, **_PER_LAYER
    ),
    "gemma4-e4b": _gemma4(2560, 10_240, 42, 8, 2, n_sharing=18, **_PER_LAYER),
    "gemma4-31b": _gemma4(
        5376,
        21_504,
        60,
        32,
        16,
        window=1024,
        full_kv_heads=4,
        keys_as_values=True,
        max_length=262_144,
    ),
    "gemma3-270m": _gemma3(640, 2048, 18, 4, 1, window=512),
    "gemma3-1b": _gemma3(1152, 6912, 26, 4, 1, window=512),
    "gemma3-4b": _gemma3(2560, 10_240, 34, 8, 4, **_MULTIMODAL),
    "gemma3-12b": _gemma3(3840, 15_360, 48, 16, 8, **_MULTIMODAL),
    "gemma3-27b": _gemma3(
        5376, 21_504, 62, 32, 16, **_MULTIMODAL, head_dim=128, attention_scale=168**-0.5
    ),
    "gemma2-2b": _gemma2(2304, 9216, 26, 8, 4, head_dim=256, attention_scale=256**-0.5),
    "gemma2-9b": _gemma2(3584, 14_336, 42, 16, 8, head_dim=256, attention_scale=256**-0.5),
    "gemma2-27b": _gemma2(4608, 36_864, 46, 32, 16, head_dim=128, attention_scale=144**-0.5),
    "llama3.2-1b": _llama3(2048, 8192, 16, 32, 8, head_dim=64, factor=32.0, tied=True),
    "llama3.2-3b": _llama3(3072, 8192, 28, 24, 8, factor=32.0, tied=True),
    "llama3.1-8b": _llama3(4096, 14_336, 32, 32, 8),
    "llama3.1-70b": _llama3(8192, 28_672, 80, 64, 8),
    "llama3.1-405b": _llama3(16_384, 53_248, 126, 128, 8),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, 8, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, 8, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, 8, tied=True),
    "qwen3-8b": _qwen3(4096, 12_288, 36, 32, 8),
    "qwen3-14b": _qwen3(5120, 17_408, 40, 40, 8),
    "qwen3-32b": _qwen3(5120, 25_600, 64, 64, 8),
    "qwen2.5-0.5b": _qwen25(
        151_936, 896, 4864, 24, 14, 2, head_dim=64, max_length=32_768, tied=True
    ),
    "qwen2.5-7b": _qwen25(152_064, 3584, 18_944, 28, 28, 4, head_dim=128, max_length=131_072),
    "mistral-7b": _plain(
        *("mistral", 32_000, 4096, 14_336, 32, 32, 8),
        **{
            "sliding": (True,) * 32,
            "window": 4096,
            "rope_theta": 1e4,
            "norm_eps": 1e-5,
            "bos_id": 1,
            "eos_id": 2,
        },
    ),
    "qwen3-30b-a3b": _plain(
        *("qwen3_moe", 151_936, 2048, 768, 48, 32, 4),
        **{"n_experts": 128, "experts_per_token": 8, "normalised_shares": True, "qk_norm": True},
        **{"rope_theta": 1e6, "max_length": 40_960, "bos_id": 151_643, "eos_id": 151_645},
    ),
    "mixtral-8x7b": _plain(
        *("mixtral", 32_000, 4096, 14_336, 32, 32, 8),
        **{"n_experts": 8, "experts_per_token": 2, "normalised_shares": True},
        **{"rope_theta": 1e6, "norm_eps": 1e-5, "max_length": 32_768, "bos_id": 1, "eos_id": 2},
    ),
    "phi3-mini-4k": _plain(
        *("phi3", 32_064, 3072, 8192, 32, 32, 32),
        **{
            "head_dim": 96,
            "sliding": (True,) * 32,
            "window": 2047,
            "rope_theta": 1e4,
            "norm_eps": 1e-5,
        },
        **{"max_length": 4096, "bos_id": 1, "eos_id": 32_000},
    ),
    "phi4": _plain(
        *("phi3", 100_352, 5120, 17_920, 40, 40, 10),
        **{
            "rope_theta": 2.5e5,
            "norm_eps": 1e-5,
            "max_length": 16_384,
            "bos_id": 100_257,
            "eos_id": 100_265,
        },
    ),
    "smollm3-3b": _plain(
        *("smollm3", 128_256, 2048, 11_008, 36, 16, 4),
        **{
            "rotated": (True, True, True, False) * 9,
            "rope_theta": 5e6,
            "tied": True,
            "max_length": 65_536,
        },
        **{"bos_id": 128_000, "eos_id": 128_012},
    ),
    "olmo2-7b": _olmo("olmo2", 100_352, 4096, 11_008, 32, 32, 32, max_length=4096),
    "olmo3-7b": _olmo(
        *("olmo3", 100_278, 4096, 11_008, 32, 32, 32),
        **{
            "sliding": (True, True, True, False) * 8,
            "window": 4096,
            "rope_theta_sliding": 5e5,
            "max_length": 65_536,
        },
        **{
            "rope_factor": 8.0,
            "rope_stretch": YarnStretch(1.0, 32.0, 8192, attention_factor=1.2079441541679836),
        },
    ),
}
