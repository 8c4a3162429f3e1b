"""Texts to arrays: examples, first-fit packing into rows, and batches of one fixed shape.

    example    tokens  BOS the cat sat EOS        weights  0 1 1 1 1
    inputs             BOS the cat sat
    targets            the cat sat EOS            each predicted from the inputs up to it

    row        tokens     BOS the cat sat  BOS a  dog  .
               segments     1   1   1   1    2 2    2  0       0 is padding; attention stays within a segment
               positions    0   1   2   3    0 1    2  0

The rows of a step are a pure function of (seed, step), so a resumed run needs the step number
alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from tokenizers import Tokenizer

from kafjax.core.errors import UserError
from kafjax.hub import text as text_tokens
from kafjax.hub.text import Prompt

OPEN_ROWS = 4096
# the fixed number of loss targets of a batch is rounded up to a multiple of this
_TARGETS_MULTIPLE = 32


@dataclasses.dataclass(frozen=True)
class Example:
    """One text to learn from.

    Attributes:
      tokens: int32 `[n]`.
      weights: float32 `[n]`, how much the loss counts predicting `tokens[i]` from the ones before
        it. `weights[0]` is never used: nothing comes before the first token.
      n_front: tokens at the beginning that stand before any text (BOS); every piece of a text that
        is cut begins with them.
    """

    tokens: np.ndarray
    weights: np.ndarray
    n_front: int = 0


def text_example(tokenizer: Tokenizer, text: str, eos_id: int) -> Example:
    """Makes an example of a text: BOS if the tokenizer adds one, the text, one EOS. The loss looks
    at every token but BOS."""
    return text_examples(tokenizer, [text], eos_id)[0]


def text_examples(tokenizer: Tokenizer, texts: list[str], eos_id: int) -> list[Example]:
    """`text_example` of many texts, tokenized on all cores."""
    front = text_tokens.front(tokenizer)
    return [
        _weighted(len(front), max(len(front), 1), [*front, *ids, eos_id])
        for ids in text_tokens.contents(tokenizer, texts)
    ]


def answer_example(
    tokenizer: Tokenizer, prompt: Prompt, answer: Prompt | Sequence[int], eos_id: int | None = None
) -> Example:
    """Makes an example of a prompt and its answer; the loss looks at the answer (and the EOS, if
    given) only.

    The prompt is tokenized by itself, as in generation, and the answer as its continuation. The end
    that the model should learn to write, a newline or the end of its turn, is part of `answer`.
    """
    before = text_tokens.prompt_ids(tokenizer, prompt)
    after = (
        text_tokens.continued(tokenizer, prompt, answer)
        if isinstance(answer, Prompt)
        else list(answer)
    )
    after += [] if eos_id is None else [eos_id]
    return _weighted(_n_front(tokenizer, prompt, before), max(len(before), 1), [*before, *after])


def _weighted(n_front: int, n_given: int, tokens: list[int]) -> Example:
    """Makes an example whose first `n_given` tokens are not learned."""
    weights = np.ones(len(tokens), np.float32)
    weights[:n_given] = 0
    return Example(np.array(tokens, np.int32), weights, n_front)


def _n_front(tokenizer: Tokenizer, prompt: Prompt, ids: list[int]) -> int:
    """Counts the tokens before any content: BOS, or the markup of a chat template before the first
    turn's content."""
    if isinstance(prompt, str):
        return len(text_tokens.front(tokenizer))
    # its last token may reach into the content
    markup = text_tokens.prompt_ids(tokenizer, text_tokens.Marked(prompt.parts[:1]))
    return next(
        (i for i, (a, b) in enumerate(zip(markup, ids, strict=False)) if a != b),
        min(len(markup), len(ids)),
    )


class Piece(NamedTuple):
    """A part of an example that stands in one row: aligned inputs, targets and weights, `[n]`
    each."""

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


Row = list[Piece]


def pieces(example: Example, seq_len: int) -> list[Piece]:
    """Cuts an example into pieces of at most `seq_len` inputs; every weighted token is the target
    of exactly one.

        text      BOS a b c d e EOS    seq_len 4    ->    BOS a b c | BOS c d e     targets of the second: (c) d e EOS, (c) unweighted
        question  BOS q q q q : A B    seq_len 4    ->    BOS q : A                 the prompt loses its beginning, never the answer

    Inputs after the last weighted target are dropped: nothing is learned from them.
    """
    weighted = np.flatnonzero(example.weights[1:])
    if not weighted.size:
        return []
    n, n_front = int(weighted[-1]) + 1, min(example.n_front, seq_len - 1)
    tokens, weights = example.tokens[: n + 1], example.weights[: n + 1]
    if surplus := _cut_of_prompt(example, seq_len):
        kept = np.r_[:n_front, n_front + surplus : n + 1]
        tokens, weights, n = tokens[kept], weights[kept], n - surplus
    front = tokens[:n_front]
    made = [Piece(tokens[:n][:seq_len], tokens[1 : n + 1][:seq_len], weights[1 : n + 1][:seq_len])]
    for start in range(seq_len, n, seq_len - n_front):
        own = slice(start, min(start + seq_len - n_front, n))
        inputs = np.concatenate([front, tokens[own]])
        targets = np.concatenate([inputs[1:], tokens[own.stop : own.stop + 1]])
        made.append(
            Piece(
                inputs,
                targets,
                np.concatenate(
                    [np.zeros(n_front, np.float32), weights[own.start + 1 : own.stop + 1]]
                ),
            )
        )
    return [piece for piece in made if piece.weights.any()]


def _cut_of_prompt(example: Example, seq_len: int) -> int:
    """Counts the tokens that a prompt loses behind BOS so that its answer stays in one row; a token
    of it is kept."""
    weighted = np.flatnonzero(example.weights[1:])
    surplus, droppable = (
        int(weighted[-1]) + 1 - seq_len,
        int(weighted[0]) - min(example.n_front, seq_len - 1),
    )
    return max(min(surplus, droppable), 0)


class Cuts(NamedTuple):
    """Numbers of examples that do not fit into a row: texts continued in further rows, prompts that
    lose their beginning."""

    texts: int = 0
    prompts: int = 0

    @classmethod
    def of(cls, example: Example, seq_len: int) -> Cuts:
        made = pieces(example, seq_len)
        return cls(int(len(made) > 1), int(bool(made) and _cut_of_prompt(example, seq_len) > 0))

    def __add__(self, other: Cuts) -> Cuts:  # ty: ignore[incompatible-method-override]
        return Cuts(self.texts + other.texts, self.prompts + other.prompts)

    def told(self, seq_len: int) -> str:
        """Describes the cuts; "" if there are none."""
        texts = (
            f"{self.texts} texts go on in further rows, each of which begins as a text does"
            if self.texts
            else ""
        )
        prompts = (
            f"{self.prompts} prompts lost their beginning, their answers are whole"
            if self.prompts
            else ""
        )
        both = "; ".join(filter(None, [texts, prompts]))
        return f"longer than seq_len={seq_len} tokens: {both}" if both else ""


def stream_rows(
    examples: Iterable[Example], seq_len: int, open_rows: int = OPEN_ROWS
) -> Iterator[Row]:
    """Packs first-fit in one pass: each piece goes into the first open row with room for it, in the
    order given.

    At most `open_rows` rows are open; a new one closes the oldest. So memory and the time of a
    piece are bounded, and rows come in the order in which they were begun. Up to `open_rows` rows
    it is plain first-fit.
    """
    rows: deque[Row] = deque()
    room = np.zeros(open_rows, np.int64)  # of rows[i], the oldest first
    for example in examples:
        for piece in pieces(example, seq_len):
            n = len(piece.inputs)
            fits = room[: len(rows)] >= n
            at = int(np.argmax(fits)) if fits.any() else len(rows)
            if at == len(rows):
                if at == open_rows:
                    yield rows.popleft()
                    room[:-1] = room[1:]
                    at -= 1
                rows.append([])
                room[at] = seq_len
            rows[at].append(piece)
            room[at] -= n
    yield from rows


def pack(examples: Iterable[Example], seq_len: int) -> list[Row]:
    """All rows of `stream_rows`."""
    return list(stream_rows(examples, seq_len))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """B rows of T tokens and the places of the loss, in S groups of B / S rows each.

    A group is the part of one data-parallel share of the devices (S = 1 on one device).
    `places_SxN` are positions within the group: place p is row p // T, column p % T of the group,
    and its hidden state predicts `targets_SxN`. Unused places have weight 0. Every array may carry
    a leading axis A of microbatches.
    """

    tokens_BxT: Any  # numpy on the host, JAX on devices
    positions_BxT: Any
    segments_BxT: Any
    places_SxN: Any
    targets_SxN: Any
    weights_SxN: Any


def make_batch(
    rows: Sequence[Row],
    *,
    seq_len: int,
    batch_rows: int,
    groups: int = 1,
    capacity: int | None = None,
) -> Batch:
    """Lays rows out as arrays; missing rows are left empty. `capacity` (N) defaults to the need of
    the fullest group."""
    n_targets = [_n_targets(share) for share in _shares(rows, batch_rows, groups)]
    capacity = max(*n_targets, 1) if capacity is None else capacity
    tokens, positions, segments = (np.zeros((batch_rows, seq_len), np.int32) for _ in range(3))
    places, targets = (np.zeros((groups, capacity), np.int32) for _ in range(2))
    weights = np.zeros((groups, capacity), np.float32)
    filled = [0] * groups
    for r, row in enumerate(rows):
        group, row_in_group = divmod(r, batch_rows // groups)
        start = 0
        for segment, piece in enumerate(row, 1):
            n = len(piece.inputs)
            where = slice(start, start + n)
            tokens[r, where], positions[r, where], segments[r, where] = (
                piece.inputs,
                np.arange(n),
                segment,
            )
            looked_at = np.flatnonzero(piece.weights)
            to = slice(filled[group], filled[group] + len(looked_at))
            places[group, to] = row_in_group * seq_len + start + looked_at
            targets[group, to], weights[group, to] = (
                piece.targets[looked_at],
                piece.weights[looked_at],
            )
            filled[group] = to.stop
            start += n
    return Batch(tokens, positions, segments, places, targets, weights)


class BatchShape(Protocol):
    """The sizes of a batch: see `Batches`."""

    seq_len: int
    batch_rows: int
    accumulate: int
    groups: int
    capacity: int


class Batches:
    """The batches of a whole run: `len(batches)` of them, each `batches[step]` a `Batch` of numpy
    arrays of one fixed shape.

    Epoch e shuffles `variants[e % len(variants)]` (documents may be worded differently from epoch
    to epoch) by (seed, e), packs it, and its rows follow those of epoch e - 1, so that only the
    very last batch has empty rows.

    Args:
      variants: one or more lists of examples.
      seq_len: T, tokens per row. Longer examples are cut (`cuts` says how many of an epoch).
      batch_rows: B, rows per optimizer step.
      epochs: passes over the data.
      seed: of the order.
      accumulate: A; if above 1, batches have a leading axis of A microbatches of B / A rows.
      groups: S, data-parallel shares of a microbatch.

    Raises:
      UserError: nothing to learn from, or rows that do not divide into microbatches and groups.
    """

    def __init__(
        self,
        variants: Sequence[Sequence[Example]],
        *,
        seq_len: int,
        batch_rows: int,
        epochs: int,
        seed: int = 0,
        accumulate: int = 1,
        groups: int = 1,
    ):
        check_divides(batch_rows, accumulate, groups)
        self.seq_len, self.batch_rows, self.epochs = seq_len, batch_rows, epochs
        self.accumulate, self.groups = accumulate, groups
        self.rows: list[Row] = []
        for epoch in range(epochs):
            examples = variants[epoch % len(variants)]
            order = np.random.default_rng((seed, epoch)).permutation(len(examples))
            self.rows += pack([examples[i] for i in order], seq_len)
        if not self.rows:
            raise UserError("nothing to train on: no example has a token that the loss looks at")
        self.cuts = functools.reduce(
            Cuts.__add__, (Cuts.of(example, seq_len) for example in variants[0]), Cuts()
        )
        micro_rows = batch_rows // accumulate
        micros = [
            self.rows[start : start + micro_rows] for start in range(0, len(self.rows), micro_rows)
        ]
        self.capacity = rounded_capacity(
            max(
                _n_targets(share)
                for micro in micros
                for share in _shares(micro, micro_rows, groups)
            )
        )

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_rows)

    def __getitem__(self, step: int) -> Batch:
        return self.share(step, list(range(self.groups)))

    def share(self, step: int, groups: Sequence[int]) -> Batch:
        """The rows of some groups of a batch, as a batch of their own."""
        if not 0 <= step < len(self):
            raise IndexError(step)
        rows = self.rows[step * self.batch_rows : (step + 1) * self.batch_rows]
        return share_of(rows, groups, self)

    def n_tokens(self, step: int) -> int:
        """Tokens of a batch, padding not counted."""
        rows = self.rows[step * self.batch_rows : (step + 1) * self.batch_rows]
        return sum(len(piece.inputs) for row in rows for piece in row)

    def n_targets(self, steps: int) -> int:
        """Counts the targets of the loss in the first `steps` batches."""
        return _n_targets(self.rows[: steps * self.batch_rows])


def check_divides(batch_rows: int, accumulate: int, groups: int) -> None:
    if batch_rows % (accumulate * groups):
        raise UserError(
            f"batch_rows={batch_rows} does not divide into accumulate={accumulate} microbatches over {groups} data-parallel devices; "
            f"use a multiple of {accumulate * groups}"
        )


def rounded_capacity(most_targets: int) -> int:
    """Rounds up the number of targets of the fullest group to N."""
    return -(-most_targets // _TARGETS_MULTIPLE) * _TARGETS_MULTIPLE


def share_of(rows: Sequence[Row], groups: Sequence[int], shape: BatchShape) -> Batch:
    """Lays out the rows of `groups` of one step."""
    micro_rows = shape.batch_rows // shape.accumulate
    group_rows = micro_rows // shape.groups
    micros = []
    for start in range(0, shape.batch_rows, micro_rows):
        # Missing rows are at the end, so an incomplete group has nothing behind it but empty ones.
        starts = [start + group * group_rows for group in groups]
        picked = [
            row
            for first in starts
            for row in [*rows[first : first + group_rows], *[[]] * group_rows][:group_rows]
        ]
        micros.append(
            make_batch(
                picked,
                seq_len=shape.seq_len,
                batch_rows=group_rows * len(groups),
                groups=len(groups),
                capacity=shape.capacity,
            )
        )
    return (
        micros[0]
        if shape.accumulate == 1
        else jax.tree.map(lambda *arrays: np.stack(arrays), *micros)
    )


def _shares(rows: Sequence[Row], batch_rows: int, groups: int) -> list[Sequence[Row]]:
    size = batch_rows // groups
    return [rows[g * size : (g + 1) * size] for g in range(groups)]


def _n_targets(rows: Sequence[Row]) -> int:
    return sum(int(np.count_nonzero(piece.weights)) for row in rows for piece in row)
