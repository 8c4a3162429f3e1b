"""Greedy replies of every family, token by token, against transformers' own generation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracles import carry_over, tiny_hf

from kafjax.generation import Generator, Sampling
from kafjax.generation.batching import bucket

PROMPTS = [
    "The lamp",
    "A fox, two hens and a grey goose share the yard",
    "Whoever asks for the name of the miller will be",
]
N_NEW = 12
FULL_CONTEXT = 20  # of the longest prompt and its reply; what fills up rows lies beyond it
OVERRIDES = {
    "llama": {
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 0.25,
            "high_freq_factor": 1.0,
        }
    },
    "mistral": {"sliding_window": 7},
    "ministral3": {},
    "phi3": {"original_max_position_embeddings": FULL_CONTEXT},
    "qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    "qwen3": {},
    "gemma4_text": {"sliding_window": 7, "tie_word_embeddings": False},
    "gemma2": {"sliding_window": 7, "layer_types": None, "num_key_value_heads": 4},
    "qwen3_moe": {"num_experts_per_tok": 2, "norm_topk_prob": True},
    "mixtral": {},
    "olmo3": {"sliding_window": 7},
}
OVERRIDES["llama"]["rope_parameters"] |= {
    "rope_theta": 100.0,
    "original_max_position_embeddings": 12,
}


@pytest.mark.parametrize("family", OVERRIDES)
def test_greedy_replies_equal_transformers(family, tokenizer, tmp_path):
    sizes = dict.fromkeys(
        ("vocab_size", "vocab_size_per_layer_input")[: 1 + (family == "gemma4_text")],
        tokenizer.get_vocab_size(),
    )
    hf = tiny_hf(family, **sizes, **OVERRIDES[family])
    model, params = carry_over(hf, tmp_path)
    assert (
        max(len(tokenizer.encode(prompt).ids) for prompt in PROMPTS) + N_NEW
        == FULL_CONTEXT
        < bucket(FULL_CONTEXT - N_NEW)
    )
    replies = Generator(model, tokenizer).generate(
        params, PROMPTS, Sampling(max_new_tokens=N_NEW, stop=())
    )
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        with torch.no_grad():
            out = hf.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=N_NEW,
                pad_token_id=0,
            )
        assert list(reply.tokens) == out[0, ids.shape[1] :].tolist()
    assert (
        len({reply.tokens for reply in replies}) == len(PROMPTS)
        and np.mean([len(set(r.tokens)) for r in replies]) > 3
    )
