"""Log-likelihoods of given replies: those of the whole text, computed the slow way."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kafjax.core.errors import UserError
from kafjax.generation import Generator
from kafjax.generation.generator import LIKELIHOOD_ROWS
from kafjax.hub.text import continued, prompt_ids

PREFIX = "The lamp stood by the window.\n"
PROMPTS = ["Who is grey?", "q", "What stood by the river, and where did nobody live since then?"]
REPLIES = [
    [" A goose.\n", " A fox\n", " The river ran past the old mill, where nobody had lived.\n"],
    [" x\n"],
    [f" {word}\n" for word in ("mill", "lamp", "hens", "yard", "fox", "goose", "winter")],
]


def slow(model, params, tokenizer, prefix: str, prompt: str, reply: str) -> float:
    # as in generation: what is cached is tokenized by itself, and so is what follows it
    front = [*prompt_ids(tokenizer, prefix), *continued(tokenizer, prefix, prompt)]
    before = front if prefix else prompt_ids(tokenizer, prompt)
    after = continued(tokenizer, prompt, reply)
    tokens = jnp.array([[*before, *after]])
    hidden, _ = model.hidden(params, tokens)
    log_p = jax.nn.log_softmax(model.logits(params, hidden)[0], axis=-1)
    places = np.arange(len(before), tokens.shape[1])
    return float(log_p[places - 1, tokens[0, places]].sum())


@pytest.mark.parametrize("prefix", [PREFIX, None])
@pytest.mark.parametrize("batch_tokens", [8192, 64])
def test_they_are_those_of_the_whole_text(model, tokenizer, params, prefix, batch_tokens):
    generator = Generator(model, tokenizer, batch_tokens=batch_tokens)
    cached = None if prefix is None else generator.prefix(params, prefix)
    assert sum(map(len, REPLIES)) > LIKELIHOOD_ROWS
    found = generator.log_likelihoods(params, PROMPTS, REPLIES, cached)
    expected = [
        [slow(model, params, tokenizer, prefix or "", prompt, reply) for reply in replies]
        for prompt, replies in zip(PROMPTS, REPLIES, strict=True)
    ]
    assert [len(row) for row in found] == [3, 1, 7]
    np.testing.assert_allclose(
        list(itertools.chain(*found)), list(itertools.chain(*expected)), atol=2e-4
    )


def test_probabilities_of_all_next_tokens_sum_to_one(model, tokenizer, params):
    letters = [chr(n) for n in range(33, 127)]
    singles = [x for x in letters if len(continued(tokenizer, "q", x)) == 1]
    (row,) = Generator(model, tokenizer).log_likelihoods(params, ["q"], [singles])
    assert len(singles) > 50 and 0 < np.exp(row).sum() < 1
    hidden, _ = model.hidden(params, jnp.array([prompt_ids(tokenizer, "q")]))
    p = jax.nn.softmax(model.logits(params, hidden)[0, -1])
    ids = [continued(tokenizer, "q", x)[0] for x in singles]
    np.testing.assert_allclose(np.exp(row).sum(), p[np.array(ids)].sum(), rtol=1e-4)


def test_what_cannot_be_weighed_is_named(model, tokenizer, params):
    generator = Generator(model, tokenizer)
    with pytest.raises(UserError, match="empty prompt"):
        generator.log_likelihoods(params, [""], [["x"]])
    with pytest.raises(UserError, match=r"needs .* tokens with its reply"):
        generator.log_likelihoods(params, ["q"], [["x" * 400]])
