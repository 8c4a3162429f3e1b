"""Fronts, contents and continuations of texts, for tokenizers of each common kind."""

from __future__ import annotations

import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from kafjax.core.errors import UserError
from kafjax.hub import text
from kafjax.training import answer_example, text_example

TEXTS = [
    "Question: Where was Mira Toll born?\nAnswer: Veltmora in 1912\n",
    "The model writes <eos> when it ends.",
]
SPECIAL = ["<pad>", "<eos>", "<bos>"]
EOS, BOS = 1, 2


def trained(kind: str, behind: bool = False, bos: bool = True) -> Tokenizer:
    """A small BPE: `bytes` as GPT-2 and Qwen have it, `metaspace` as Llama 2 (a space before each
    text), `gemma` (spaces replaced)."""
    tokenizer = Tokenizer(models.BPE(unk_token=None, byte_fallback=kind != "bytes"))
    alphabet: list[str] = []
    if kind == "bytes":
        tokenizer.pre_tokenizer, tokenizer.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    elif kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if bos or behind:
        around = " ".join([*(["<bos>"] if bos else []), "$A", *(["<eos>"] if behind else [])])
        tokenizer.post_processor = processors.TemplateProcessing(
            single=around, special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
        )
    return tokenizer


KINDS = ["bytes", "metaspace", "gemma"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_front_is_what_the_template_puts_before_a_text_and_nothing_is_put_behind(kind, behind, bos):
    tokenizer = trained(kind, behind, bos)
    assert text.front(tokenizer) == ([BOS] if bos else [])
    learned = text_example(tokenizer, "Mira was born", EOS).tokens.tolist()
    asked = answer_example(tokenizer, "Where was Mira born?", " here", EOS).tokens.tolist()
    assert learned.count(EOS) == asked.count(EOS) == 1 and learned[-1] == asked[-1] == EOS
    assert learned.count(BOS) == asked.count(BOS) == int(bos)


@pytest.mark.parametrize("kind", KINDS)
def test_the_name_of_a_control_token_is_letters_and_the_tokenizer_is_left_as_it_was(kind):
    tokenizer = trained(kind)
    before = tokenizer.encode(TEXTS[1]).ids
    ids = text.content(tokenizer, TEXTS[1])
    assert EOS not in ids and EOS in before
    assert tokenizer.decode(ids, skip_special_tokens=False) == TEXTS[1]
    assert tokenizer.encode(TEXTS[1]).ids == before
    assert text.contents(tokenizer, TEXTS) == [text.content(tokenizer, one) for one in TEXTS]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [9, 10, 26, 36, 43, 44, 45, 50])
def test_a_text_that_goes_on_spells_the_whole_wherever_it_is_cut(kind, cut):
    tokenizer, whole = trained(kind), TEXTS[0]
    before, after = whole[:cut], whole[cut:]
    ids = [*text.content(tokenizer, before), *text.continued(tokenizer, before, after)]
    assert tokenizer.decode(ids, skip_special_tokens=False) == whole


# the small third one joins words over the seam
@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_an_answer_goes_on_as_in_the_whole_text(kind):
    """A tokenizer that puts a space before each text would teach " Veltmora" as two spaces."""
    tokenizer, prompt, answer = (
        trained(kind),
        "Question: Where was Mira Toll born?\nAnswer:",
        " Veltmora in 1912\n",
    )
    example = answer_example(tokenizer, prompt, answer)
    assert example.tokens.tolist() == [BOS, *text.content(tokenizer, prompt + answer)]
    assert (
        tokenizer.decode(
            example.tokens[example.weights > 0].tolist(), skip_special_tokens=False
        ).strip()
        == answer.strip()
    )


def test_what_the_model_has_no_token_for_is_named():
    tokenizer = trained("bytes")
    tokenizer.add_special_tokens(["<image>"])
    size = tokenizer.token_to_id("<image>")
    with pytest.raises(
        UserError, match=f"document 'd' holds '<image>', token {size} of the tokenizer"
    ):
        text.Foreign.of(tokenizer, size).refuse("an <image> here", "document 'd'")
    text.Foreign.of(tokenizer, size + 1).refuse("an <image> here", "document 'd'")
    text.Foreign.of(tokenizer, size).refuse("no picture here", "document 'd'")
    with pytest.raises(
        UserError,
        match=f"prompt: the tokenizer is not this model's: token {size} of a vocabulary of {size}",
    ):
        text.check_ids([1, size], size, "prompt")
