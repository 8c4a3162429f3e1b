from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kafjax.generation.stops import Stops

EOS = 1


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    """A tokenizer like GPT-2's: a token is some bytes, spelled in other characters ("\\n" as "Ċ");
    a character may be several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=alphabet,
        special_tokens=["<pad>", "<eos>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["one two\n\nthree two\n\nfour two\n\n"], trainer)
    return tokenizer


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    """A tokenizer like Gemma's: pieces with ▁ for a space, and a token for each byte."""
    vocab = {"<pad>": 0, "<eos>": 1, "▁a": 2, "b": 3, "▁": 4, "<0x0A>": 5, "\n": 6, ".\n": 7}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def test_a_line_end_is_caught_however_its_token_is_spelled(byte_level, byte_fallback):
    stops = Stops.of(byte_fallback, ("\n",), 8, EOS)
    assert stops.tokens == {EOS, 5, 6, 7}
    assert [i for i, ends in enumerate(stops.mask_V.tolist()) if ends] == [1, 5, 6, 7]
    assert stops.in_one_token
    assert stops.cut([2, 3, 5, 3]) == (" ab", (2, 3, 5), True)
    assert stops.cut([2, 7, 3]) == (" a.", (2, 7), True)
    assert Stops.of(byte_fallback, (" a",), 8, EOS).tokens == {EOS, 2}

    ids = byte_level.encode("one\n\ntwo").ids
    stops = Stops.of(byte_level, ("\n",), byte_level.get_vocab_size(), EOS)
    text, tokens, ended = stops.cut(ids)
    assert (text, ended) == ("one", True)
    assert byte_level.decode(tokens).startswith("one\n")


def test_one_character_may_be_several_tokens(byte_level):
    ids = byte_level.encode("aé.").ids
    assert len(ids) == 4
    stops = Stops.of(byte_level, ("é",), 300, EOS)
    assert not stops.in_one_token
    assert stops.cut(ids[:2]) == (byte_level.decode(ids[:2]), tuple(ids[:2]), False)
    assert stops.cut(ids) == ("a", tuple(ids[:3]), True)


def test_the_model_may_know_more_or_fewer_tokens_than_the_tokenizer(byte_fallback):
    assert Stops.of(byte_fallback, ("\n",), 6, EOS).tokens == {EOS, 5}
    wider = Stops.of(byte_fallback, ("\n",), 64, EOS)
    assert wider.mask_V.shape == (64,)
    assert wider.tokens == {EOS, 5, 6, 7}


def test_without_stop_strings_only_eos_ends_a_reply(byte_fallback):
    stops = Stops.of(byte_fallback, (), 8, 3)
    assert stops.in_one_token
    # EOS is no part of the text, also where the tokenizer takes it for an ordinary token.
    assert stops.cut([6, 2, 3, 2]) == ("\n a", (6, 2, 3), True)
    assert stops.cut([6, 2]) == ("\n a", (6, 2), False)
    assert stops.cut([3]) == ("", (3,), True)
    of_a_chat = Stops.of(byte_fallback, (), 8, 3, 2)
    assert of_a_chat.tokens == {2, 3}
    assert of_a_chat.cut([6, 2, 3]) == ("\n", (6, 2), True)


@settings(max_examples=200)
@given(st.data())
def test_a_reply_is_the_shortest_beginning_with_a_stop_string(tokenizer, data):
    known = [i for i in range(tokenizer.get_vocab_size()) if i > 2]
    tokens = data.draw(
        st.lists(st.sampled_from(known[:12] + known[-12:]) | st.just(EOS), min_size=1, max_size=12)
    )
    whole = tokenizer.decode(tokens)
    pieces = st.builds(
        lambda at, n: whole[at : at + n] or "?", st.integers(0, 30), st.integers(1, 5)
    )
    strings = tuple(data.draw(st.lists(pieces, max_size=3)))
    stops = Stops.of(tokenizer, strings, tokenizer.get_vocab_size(), EOS)

    text, kept, ended = stops.cut(tokens)

    def holds(n):
        return tokens[n - 1] == EOS or any(s in tokenizer.decode(tokens[:n]) for s in strings)

    shortest = next((n for n in range(1, len(tokens) + 1) if holds(n)), None)
    assert ended == (shortest is not None)
    assert list(kept) == tokens[:shortest]
    assert not any(s in text for s in strings)
    said = tokenizer.decode(kept)
    assert said.startswith(text) and (
        said == text or any(said[len(text) :].startswith(s) for s in strings)
    )
    if stops.in_one_token:  # the device alone finds the same end
        assert shortest == next(
            (n for n, token in enumerate(tokens, 1) if token in stops.tokens), None
        )
