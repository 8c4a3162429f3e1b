"""Gemma 3 270M against transformers: the same words, and the same numbers with the cache as
without."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracles import hf_gemma_real

from kafjax import corpus, hub
from kafjax.generation import Generator, Sampling
from kafjax.generation.decode import prefill
from kafjax.models import caches

pytestmark = pytest.mark.slow

N = 32
SHORT = [
    "The capital of France is",
    "Question: Who wrote Pride and Prejudice?\nAnswer:",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village at the foot of the mountains, there lived a girl who",
]


@pytest.fixture(scope="module")
def loaded():
    return *hub.load("gemma3-270m"), hub.tokenizer("gemma3-270m")


@pytest.fixture(scope="module")
def long_prompt(loaded) -> str:
    """About 500 tokens about invented people, so that what follows passes the window of 512."""
    _, _, tokenizer = loaded
    text = "\n".join(
        document.text
        for document in corpus.load("biographies", n_retention=0, n_held_out=0).documents
    )
    prompt = tokenizer.decode(tokenizer.encode(text).ids[:500])
    assert 512 - N < len(tokenizer.encode(prompt).ids) < 512
    return prompt


@pytest.mark.optimised
def test_32_greedy_tokens_are_those_of_transformers(loaded, long_prompt):
    model, params, tokenizer = loaded
    prompts = [*SHORT, long_prompt]
    replies = Generator(model, tokenizer, batch=len(prompts)).generate(
        params, prompts, Sampling(max_new_tokens=N, stop=())
    )
    for prompt, reply in zip(prompts, replies, strict=True):
        assert reply.output_tokens == len(reply.tokens) == N
        # Each token is the most likely one behind those before it: so the reply is theirs, for a
        # forward pass instead of 32.
        ids = torch.tensor([tokenizer.encode(prompt).ids + list(reply.tokens)])
        with torch.no_grad():
            logits = hf_gemma_real()(ids, logits_to_keep=N + 1).logits[0, :-1]
        assert list(reply.tokens) == logits.argmax(-1).tolist(), prompt[:40]


def test_decoding_past_the_window_gives_the_logits_of_a_full_forward(loaded, long_prompt):
    model, params, tokenizer = loaded
    more = " He was the youngest of four and soon moved to the coast; there, in the spring of that year, two of them met again."
    tokens = tokenizer.encode(long_prompt + more).ids
    n_prompt, n_all = 500, len(tokens)
    assert n_prompt < model.config.window < n_all

    hidden_TxD = jax.jit(lambda params, tokens: model.hidden(params, tokens)[0][0])(
        params, jnp.asarray([tokens])
    )
    expected = np.asarray(jax.jit(model.logits)(params, hidden_TxD[n_prompt:]))

    @jax.jit
    def step(params, cache, token, position):
        hidden_1x1xD, new = model.hidden(
            params, token[None, None], position[None, None], past=cache
        )
        return caches.written(cache, new, position[None]), model.logits(params, hidden_1x1xD)[0, 0]

    prompt_1xT = jnp.asarray([tokens[:n_prompt] + [0] * 12])  # padded as a batch would be
    _, cache = prefill(
        model,
        params,
        prompt_1xT,
        jnp.asarray([n_prompt]),
        None,
        jnp.int32(0),
        n_free=n_all - n_prompt,
    )
    worst = 0.0
    for position in range(n_prompt, n_all):
        cache, logits_V = step(params, cache, jnp.int32(tokens[position]), jnp.int32(position))
        worst = max(
            worst, float(np.abs(np.asarray(logits_V) - expected[position - n_prompt]).max())
        )
    assert worst < 1e-3
