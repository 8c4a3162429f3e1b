"""Rows packed beforehand: nothing is lost, little is padding, any step can be read again, and
processes share no row."""

from __future__ import annotations

import itertools
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from kafjax.core.errors import UserError
from kafjax.corpus import biographies, factbook
from kafjax.methods.examples import stream_examples
from kafjax.training import Batches, Example, TrainConfig, make_batch, train
from kafjax.training.batches import pack, stream_rows
from kafjax.training.packed import PackedRows, longest_first, write_rows

pytest.importorskip("array_record", reason="array_record is not installed (extra [data])")
pytest.importorskip("grain", reason="grain is not installed (extra [data])")


def same(a, b) -> bool:
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(a) == len(b) and all(map(np.array_equal, a, b))


@pytest.fixture(scope="module")
def packed(examples, tmp_path_factory) -> PackedRows:
    folder = tmp_path_factory.mktemp("packed") / "rows"
    write_rows(folder, iter(examples), 16, tokenizer=7)
    return PackedRows.open(folder)


def test_rows_are_those_of_packing_in_memory(packed, examples, tmp_path):
    rows = pack(examples, 16)  # first-fit in the order given, as they are written
    assert packed.about.rows == len(rows) and packed.about.tokenizer == 7
    batches = packed.batches(batch_rows=1, epochs=1)
    for step in range(len(batches)):
        (number,) = batches.row_numbers(step)
        assert same(
            batches[step],
            make_batch([rows[number]], seq_len=16, batch_rows=1, capacity=batches.capacity),
        )

    # `Batches` shuffles the texts before it packs them: in that order they make its rows, and other
    # ones (also another number of them).
    expected = Batches([examples], seq_len=16, batch_rows=1, epochs=1, seed=5)
    order = np.random.default_rng((5, 0)).permutation(len(examples))
    write_rows(tmp_path / "shuffled", (examples[i] for i in order), 16)
    shuffled = PackedRows.open(tmp_path / "shuffled").batches(batch_rows=1, epochs=1)
    step_of_row = {shuffled.row_numbers(step)[0]: step for step in range(len(shuffled))}
    assert sorted(step_of_row) == list(range(len(expected)))
    assert all(same(shuffled[step_of_row[row]], expected[row]) for row in range(len(expected)))
    assert packed.about.targets == expected.n_targets(len(expected))


@pytest.mark.parametrize(("accumulate", "groups"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_every_epoch_reads_every_row_once_and_shares_are_disjoint(packed, accumulate, groups):
    batches = packed.batches(batch_rows=4, epochs=2, seed=3, accumulate=accumulate, groups=groups)
    numbers = [number for step in range(len(batches)) for number in batches.row_numbers(step)]
    n = packed.about.rows
    assert (
        sorted(numbers[:n]) == sorted(numbers[n:]) == list(range(n)) and numbers[:n] != numbers[n:]
    )
    for step in range(len(batches)):
        whole = batches[step]
        # What each process makes for its groups, put together, is the batch: nothing twice, nothing
        # left out.
        parts = [batches.share(step, [group]) for group in range(groups)]
        joined = jax.tree.map(
            lambda *arrays: np.concatenate(arrays, 0 if accumulate == 1 else 1), *parts
        )
        assert same(joined, whole)
        assert int((whole.segments_BxT > 0).sum()) == batches.n_tokens(step)
    assert batches.n_targets(len(batches)) == 2 * packed.about.targets
    shapes = {
        tuple(x.shape for x in jax.tree.leaves(batches[step])) for step in range(len(batches))
    }
    assert len(shapes) == 1


def test_a_step_depends_on_seed_and_number_only(packed):
    first, again, longer, other = (
        packed.batches(batch_rows=4, epochs=e, seed=s) for e, s in ((2, 3), (2, 3), (3, 3), (2, 4))
    )
    # read out of order, in another object
    assert same(first[len(first) - 2], again[len(first) - 2])
    assert all(
        first.row_numbers(step) == longer.row_numbers(step) for step in range(len(first) - 1)
    )
    assert first.row_numbers(0) != other.row_numbers(0)


def test_training_reads_them(model, params, packed):
    config = TrainConfig(epochs=1, batch_rows=4, seq_len=16, learning_rate=3e-3)
    result = train(model, params, packed, config)
    assert result.targets == packed.about.targets and result.tokens == packed.about.tokens
    with pytest.raises(UserError, match="holds rows of 16 tokens, not seq_len=32"):
        train(model, params, packed, TrainConfig(seq_len=32))


@given(st.lists(st.integers(2, 17), min_size=1, max_size=80), st.integers(1, 6))
@settings(deadline=None, max_examples=60)
def test_few_open_rows_lose_nothing_and_keep_the_order_of_rows(lengths, open_rows):
    examples = [
        Example(np.full(n, i, np.int32), np.ones(n, np.float32)) for i, n in enumerate(lengths)
    ]
    rows = list(stream_rows(iter(examples), 16, open_rows))
    placed = [int(piece.inputs[0]) for row in rows for piece in row]
    assert sorted(placed) == list(range(len(lengths)))
    assert all(sum(len(piece.inputs) for piece in row) <= 16 for row in rows)
    begun = [int(row[0].inputs[0]) for row in rows]
    assert begun == sorted(begun)
    # as plain first-fit, among rows that were open together
    for a, b in itertools.combinations(range(len(rows)), 2):
        if b - a < open_rows:
            assert sum(len(piece.inputs) for row in (rows[a], rows[b]) for piece in row) > 16


@pytest.mark.parametrize("seq_len", [128, 512, 1024])
@pytest.mark.parametrize("corpus", ["biographies", "factbook"])
def test_less_than_five_percent_is_padding(corpus, seq_len, tmp_path):
    # of some dozen rows: the last one may be nearly empty
    made = biographies(120) if corpus == "biographies" else factbook(120)
    # lengths matter, not what stands there
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    about = write_rows(
        tmp_path / "rows", longest_first(stream_examples(made, tokenizer, 10**6, 0)), seq_len
    )
    assert about.padding < 0.05


@given(st.lists(st.integers(2, 40), max_size=80), st.integers(1, 9))
def test_longest_first_gives_the_same_examples_in_windows(lengths, window):
    examples = [
        Example(np.full(n, i, np.int32), np.ones(n, np.float32)) for i, n in enumerate(lengths)
    ]
    given = [int(example.tokens[0]) for example in longest_first(iter(examples), window)]
    for start in range(0, len(lengths), window):
        of_window = given[start : start + window]
        assert sorted(of_window) == list(range(start, min(start + window, len(lengths))))
        assert [lengths[i] for i in of_window] == sorted(
            (lengths[i] for i in of_window), reverse=True
        )


def test_bad_folders_are_told(packed, examples, tmp_path):
    with pytest.raises(UserError, match="holds no packed rows"):
        PackedRows.open(tmp_path)
    with pytest.raises(UserError, match="is there already"):
        write_rows(packed.folder, examples, 16)
    with pytest.raises(UserError, match="nothing to pack"):
        write_rows(tmp_path / "none", [], 16)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def folder(examples, tmp_path):
    write_rows(tmp_path / "rows", examples, 16)
    return tmp_path / "rows"


def test_other_rows_than_were_written_are_told(folder):
    stored = json.loads((folder / "rows.json").read_text())
    (folder / "rows.json").write_text(json.dumps({**stored, "rows": 1}))
    with pytest.raises(UserError, match=r"holds \d+ rows, rows.json says 1"):
        PackedRows.open(folder)
    (folder / "rows.json").write_text(json.dumps({"rows": stored["rows"]}))
    with pytest.raises(
        UserError, match=r"rows\.json: seq_len: it is missing; delete that folder and pack it anew"
    ):
        PackedRows.open(folder)


@pytest.mark.parametrize("keep", [None, 0, 1, -1])
def test_missing_or_cut_rows_are_told(folder, keep):
    file = folder / "rows.array_record"
    whole = file.read_bytes()
    file.unlink()
    if keep is not None:
        file.write_bytes(whole[:keep])
    with pytest.raises(
        UserError,
        match=r"rows.array_record is missing or damaged: it holds 0 rows, rows.json says \d+; delete that",
    ):
        PackedRows.open(folder)


@pytest.mark.parametrize("keep", [None, 0, 40, -8])
def test_missing_or_cut_counts_are_told(folder, keep):
    file = folder / "counts.npy"
    whole = file.read_bytes()
    file.unlink()
    if keep is not None:
        file.write_bytes(whole[:keep])
    with pytest.raises(UserError, match=r"counts\.npy is missing or damaged"):
        PackedRows.open(folder).batches(batch_rows=2, epochs=1)


def test_flipped_bits_are_told_or_change_nothing(folder):
    file = folder / "rows.array_record"
    whole, rng, told = file.read_bytes(), np.random.default_rng(0), 0
    expected = list(PackedRows.open(folder).batches(batch_rows=4, epochs=1))
    used = np.flatnonzero(np.frombuffer(whole, np.uint8))  # the rest is padding between blocks
    for at in rng.choice(used, 60, replace=False):
        broken = bytearray(whole)
        broken[at] ^= 1 << int(rng.integers(8))
        file.write_bytes(broken)
        try:
            batches = list(PackedRows.open(folder).batches(batch_rows=4, epochs=1))
        except UserError as error:
            assert "rows.array_record" in str(error) and "damaged" in str(error)
            told += 1
        else:
            assert all(map(same, batches, expected))
    assert told > 30
