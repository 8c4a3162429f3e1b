"""A tiny random decoder and a tiny real tokenizer, built here; and the slow, plain way to
generate."""

from __future__ import annotations

import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, processors, trainers

from kafjax.core import trees
from kafjax.generation import Generator
from kafjax.models import Decoder, DecoderConfig

CONFIG = DecoderConfig(
    vocab_size=300,
    hidden_size=24,
    mlp_size=44,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    sliding=(True, False, True),
    window=7,
    attention_scale=8**-0.5,
    max_length=128,
)
TEXT = (
    "The lamp stood by the window and the river ran past the old mill, where nobody had lived since the winter of the great flood.\n"
    "Whoever asks for the name of the miller will be told three different ones; and each of them is right, in its own way.\n"
    "A fox, two hens and a grey goose share the yard: they are said to get along well, as long as somebody watches the fox.\n"
)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Byte-pair encoding over ASCII, 300 tokens, many of them with spaces or a line end inside; BOS
    in front."""
    tokenizer = Tokenizer(models.BPE())
    special, alphabet = ["<pad>", "<eos>", "<bos>"], sorted(string.printable)
    tokenizer.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=CONFIG.vocab_size,
            initial_alphabet=alphabet,
            special_tokens=special,
            show_progress=False,
        ),
    )
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", CONFIG.bos_id)]
    )
    assert tokenizer.get_vocab_size() == CONFIG.vocab_size
    return tokenizer


@pytest.fixture(scope="session")
def model() -> Decoder:
    return Decoder(CONFIG)


@pytest.fixture(scope="session")
def params(model) -> trees.Tree:
    """Random, norms too: with equal norms a tied embedding would have the model repeat its last
    token for ever. It never says EOS."""
    rng = np.random.default_rng(1)

    def draw(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        mean, std = (
            (-1, 1)
            if path == "final_norm/scale"
            else (0, 2 if path.endswith("scale") else CONFIG.hidden_size**-0.5)
        )
        return jnp.asarray(rng.normal(mean, std, leaf.shape), leaf.dtype)

    params = trees.map_with_path(draw, model.abstract_params())
    params["embed"]["embedding"] = params["embed"]["embedding"].at[CONFIG.eos_id].set(0)
    return params


@pytest.fixture(scope="session")
def generator(model, tokenizer) -> Generator:
    return Generator(model, tokenizer)


@pytest.fixture(scope="session")
def naive(model, tokenizer):
    """`naive(params, prompts, n)`: n greedy tokens of each prompt, each from a forward pass over
    the whole text so far.

    No cache, no buckets, no stops. What stands right of a row's end cannot be seen by it.
    """
    apply = jax.jit(model.apply)
    n_columns = CONFIG.max_length

    def generate(params: trees.Tree, prompts: list[str], n: int) -> list[list[int]]:
        rows = [tokenizer.encode(prompt).ids for prompt in prompts]
        lengths = [len(row) for row in rows]
        for _ in range(n):
            tokens = np.zeros((len(rows), n_columns), np.int32)
            for row, filled in zip(rows, tokens, strict=True):
                filled[: len(row)] = row
            logits_BxTxV = np.asarray(apply(params, tokens))
            for i, row in enumerate(rows):
                row.append(int(logits_BxTxV[i, len(row) - 1].argmax()))
        return [row[length:] for row, length in zip(rows, lengths, strict=True)]

    return generate
