from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from kafjax.core.errors import UserError
from kafjax.training import Batches, Example, answer_example, make_batch, objective, text_example
from kafjax.training.batches import Cuts, pack, pieces


@st.composite
def numbered_examples(draw):
    """Examples in which every token is its own number, so that a place in a batch tells where its
    token came from."""
    examples, number = [], 1
    for masks in draw(
        st.lists(st.lists(st.booleans(), min_size=1, max_size=20), min_size=1, max_size=12)
    ):
        tokens = np.arange(number, number + len(masks), dtype=np.int32)
        examples.append(Example(tokens, np.array(masks, np.float32)))
        number += len(masks) + 1  # a gap: the first token of an example follows none
    return examples


@given(numbered_examples(), st.integers(2, 9), st.integers(1, 3), st.integers(1, 2))
@settings(max_examples=60, deadline=None)
def test_every_weighted_token_is_predicted_once_from_its_own_past(
    examples, seq_len, rows_per_group, groups
):
    rows = pack(examples, seq_len)
    batch_rows, predicted = rows_per_group * groups, []
    for start in range(0, len(rows), batch_rows):
        batch = make_batch(
            rows[start : start + batch_rows], seq_len=seq_len, batch_rows=batch_rows, groups=groups
        )
        tokens_SxP = batch.tokens_BxT.reshape(groups, -1)
        looked_at = batch.weights_SxN > 0
        last_input_SxN = np.take_along_axis(tokens_SxP, batch.places_SxN, axis=1)
        np.testing.assert_array_equal(last_input_SxN[looked_at] + 1, batch.targets_SxN[looked_at])
        predicted += batch.targets_SxN[looked_at].tolist()
        for tokens, positions, segments in zip(
            batch.tokens_BxT, batch.positions_BxT, batch.segments_BxT, strict=True
        ):
            assert (segments[tokens == 0] == 0).all()
            for segment in set(segments[tokens > 0].tolist()):
                inside = segments == segment
                assert np.flatnonzero(inside).tolist() == list(
                    range(inside.argmax(), inside.argmax() + inside.sum())
                )
                np.testing.assert_array_equal(positions[inside], np.arange(inside.sum()))
                assert (np.diff(tokens[inside]) == 1).all()  # one stretch of one example
    expected = [
        int(t)
        for example in examples
        for t, w in zip(example.tokens[1:], example.weights[1:], strict=True)
        if w
    ]
    assert sorted(predicted) == sorted(expected)


@given(st.integers(0, 2), st.integers(0, 12), st.integers(1, 20), st.integers(4, 9))
@settings(deadline=None)
def test_every_piece_begins_as_a_text_does_and_an_answer_is_never_cut_before_its_prompt(
    n_front, n_prompt, n_answer, seq_len
):
    """Tokens are numbers: -2, -1 in front, 1.. the prompt, 100.. the answer."""
    tokens = np.r_[-n_front:0, 1 : n_prompt + 1, 100 : 100 + n_answer].astype(np.int32)
    weights = np.r_[np.zeros(n_front + n_prompt), np.ones(n_answer)].astype(np.float32)
    made = pieces(Example(tokens, weights, n_front), seq_len)
    learned = [
        int(t) for piece in made for t, w in zip(piece.targets, piece.weights, strict=True) if w
    ]
    first = n_front + n_prompt
    assert learned == tokens[max(first, 1) :].tolist()
    for piece in made:
        assert (
            len(piece.inputs) <= seq_len
            and piece.inputs[:n_front].tolist() == tokens[:n_front].tolist()
        )
        own = piece.inputs[n_front:]
        assert (
            (own > 0).all()
            and (np.diff(own[own < 100]) == 1).all()
            and (np.diff(own[own >= 100]) == 1).all()
        )
    if made and n_prompt and n_front + 1 + n_answer - 1 <= seq_len:
        assert len(made) == 1  # the prompt made room
        # and lost its beginning, not its end
        assert made[0].inputs[n_front:][made[0].inputs[n_front:] < 100][-1] == n_prompt


def test_what_was_cut_is_counted_and_told():
    text, question = (
        Example(np.arange(1, 30, dtype=np.int32), np.ones(29, np.float32), 1),
        np.zeros(20, np.float32),
    )
    question[17:] = 1
    cuts = [
        Cuts.of(text, 8),
        Cuts.of(Example(np.arange(1, 21, dtype=np.int32), question, 1), 8),
        Cuts.of(text, 64),
    ]
    assert cuts == [Cuts(1, 0), Cuts(0, 1), Cuts(0, 0)]
    told = (cuts[0] + cuts[1]).told(8)
    assert "1 texts go on in further rows" in told and "1 prompts lost their beginning" in told
    assert not cuts[2].told(64)


@given(st.lists(st.integers(2, 17), min_size=1, max_size=60))
@settings(deadline=None)
def test_first_fit_leaves_no_two_rows_that_fit_into_one(lengths):
    rows = pack([Example(np.ones(n, np.int32), np.ones(n, np.float32)) for n in lengths], 16)
    used = [sum(len(piece.inputs) for piece in row) for row in rows]
    assert max(used) <= 16
    assert all(a + b > 16 for a, b in itertools.combinations(used, 2))


def test_packed_loss_is_the_sum_of_separate_losses(model, params, examples):
    loss = jax.jit(lambda params, batch: objective.loss(model, params, batch, chunk=16))
    seq_len = 16
    rows = pack(examples, seq_len)
    assert max(len(row) for row in rows) > 1
    packed, weight = loss(
        params, make_batch(rows, seq_len=seq_len, batch_rows=len(rows), capacity=256)
    )
    singles = [
        make_batch([[piece]], seq_len=seq_len, batch_rows=1, capacity=16)
        for e in examples
        for piece in pieces(e, seq_len)
    ]
    alone = [loss(params, batch) for batch in singles]
    np.testing.assert_allclose(packed, sum(float(total) for total, _ in alone), rtol=1e-5)
    assert float(weight) == sum(float(w) for _, w in alone)


def test_loss_is_the_cross_entropy_of_the_logits(model, params, examples):
    example = max(examples, key=lambda e: len(e.tokens))
    batch = make_batch([pieces(example, 16)], seq_len=16, batch_rows=1)

    @jax.jit
    def both(params):
        logits = model.apply(params, example.tokens[None, :-1])[0]
        expected = optax.softmax_cross_entropy_with_integer_labels(logits, example.tokens[1:])
        return objective.loss(model, params, batch)[0], jnp.sum(expected * example.weights[1:])

    np.testing.assert_allclose(*both(params), rtol=1e-5)


def same(a, b) -> bool:
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(a) == len(b) and all(map(np.array_equal, a, b))


def test_order_depends_on_seed_and_epoch_only(examples):
    def build(**changed):
        return Batches(
            [examples], **{"seq_len": 16, "batch_rows": 4, "epochs": 2, "seed": 3, **changed}
        )

    first, again, longer, other = build(), build(), build(epochs=3), build(seed=4)
    assert all(same(first[step], again[step]) for step in range(len(first)))
    assert same(first.rows, longer.rows[: len(first.rows)])
    assert not same(first.rows[0], other.rows[0])
    epoch = len(build(epochs=1).rows)
    assert not same(first.rows[0], first.rows[epoch])


def test_epochs_rotate_through_the_variants():
    variants = [[Example(np.full(5, v, np.int32), np.ones(5, np.float32))] for v in (1, 2, 3)]
    batches = Batches(variants, seq_len=4, batch_rows=1, epochs=5)
    assert [int(batches[step].tokens_BxT[0, 0]) for step in range(5)] == [1, 2, 3, 1, 2]


@pytest.mark.parametrize(("accumulate", "groups"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_all_batches_have_one_shape_and_lose_nothing(examples, accumulate, groups):
    batches = Batches(
        [examples], seq_len=8, batch_rows=4, epochs=3, accumulate=accumulate, groups=groups
    )
    shapes = {
        tuple(x.shape for x in jax.tree.leaves(batches[step])) for step in range(len(batches))
    }
    assert len(shapes) == 1
    assert batches[0].tokens_BxT.shape == ((2, 2, 8) if accumulate == 2 else (4, 8))
    weight = sum(float(batches[step].weights_SxN.sum()) for step in range(len(batches)))
    assert (
        weight
        == 3 * sum(float(example.weights[1:].sum()) for example in examples)
        == batches.n_targets(len(batches))
    )
    tokens = sum(int((batches[step].segments_BxT > 0).sum()) for step in range(len(batches)))
    assert tokens == sum(batches.n_tokens(step) for step in range(len(batches)))
    cut = [Cuts.of(example, 8) for example in examples]
    assert [any(one) for one in cut] == [len(example.tokens) > 9 for example in examples]
    assert batches.cuts == Cuts(*map(sum, zip(*cut, strict=True)))


def test_bad_input_is_told():
    silent = Example(np.arange(4, dtype=np.int32), np.zeros(4, np.float32))
    with pytest.raises(UserError, match="nothing to train on"):
        Batches([[silent]], seq_len=8, batch_rows=2, epochs=1)
    with pytest.raises(UserError, match="nothing to train on"):
        Batches([[]], seq_len=8, batch_rows=2, epochs=1)
    with pytest.raises(UserError, match="multiple of 4"):
        Batches([[silent]], seq_len=8, batch_rows=6, epochs=1, accumulate=2, groups=2)


@pytest.fixture
def tokenizer() -> Tokenizer:
    words = ["<bos>", "<eos>", "Q:", "what", "?", "A:", "blue", "green", "."]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    return tokenizer


def test_text_is_framed_and_learned_whole(tokenizer):
    example = text_example(tokenizer, "what blue .", eos_id=1)
    assert example.tokens.tolist() == [0, 3, 6, 8, 1]
    assert example.weights.tolist() == [0, 1, 1, 1, 1]


@pytest.mark.parametrize("answer", ["blue green", [6, 7]])
def test_only_the_answer_is_learned(tokenizer, answer):
    example = answer_example(tokenizer, "Q: what ? A:", answer, eos_id=1)
    assert example.tokens.tolist() == [0, 2, 3, 4, 5, 6, 7, 1]
    assert example.weights.tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    batch = make_batch([pieces(example, 16)], seq_len=16, batch_rows=1)
    assert batch.targets_SxN[0].tolist() == [6, 7, 1]
    assert batch.places_SxN[0].tolist() == [4, 5, 6]
