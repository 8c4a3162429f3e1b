"""Rows packed beforehand, for corpora that do not fit into memory: written once, read by row
number.

A folder holds `rows.array_record` (a record a row, all of one length), `counts.npy` (tokens and
targets of each row), `questions.jsonl` (asked after training) and `rows.json` (its sources; written
last). The rows of a step are a pure function of (seed, step): Grain's index shuffle permutes row
numbers without a list of them. So a run resumes exactly, on any number of processes, and processes
share no row. Packing while reading (Grain's FirstFitPackIterDataset) would need its state saved per
process, and that state fits no other number of processes.

Needs the extra `[data]`.
"""

from __future__ import annotations

import array
import dataclasses
import functools
import itertools
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pydantic
from tokenizers import Tokenizer

from kafjax.core.errors import UserError
from kafjax.core.records import Question
from kafjax.core.rundir import new_folder, write_json
from kafjax.core.schema import Count, Share, read
from kafjax.corpus import load_questions, save_questions
from kafjax.training.batches import (
    Batch,
    Cuts,
    Example,
    Piece,
    Row,
    check_divides,
    rounded_capacity,
    share_of,
    stream_rows,
)

_ROWS, _COUNTS, _ABOUT = "rows.array_record", "counts.npy", "rows.json"
MOST_SEQ_LEN = 2**22
_ANEW = "delete that folder and pack it anew"
_FIELDS = (
    ("inputs", np.int32),
    ("targets", np.int32),
    ("weights", np.float32),
    ("segments", np.int32),
)


def _extra(module: str) -> Any:
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as error:
        raise UserError(
            f"rows packed beforehand need the package {module.split('.')[0]}; run: pip install 'kafjax[data]'"
        ) from error


def tokenizer_checksum(tokenizer: Tokenizer) -> int:
    """Returns the CRC-32 of a tokenizer's file, by which rows know what they were packed with."""
    return zlib.crc32(tokenizer.to_str().encode())


@dataclasses.dataclass(frozen=True)
class About:
    """Contents of `rows.json`.

    Attributes:
      rows, tokens, targets: their numbers; padding is not counted.
      cut, prompts_cut: numbers of texts continued in further rows, and of prompts that lost their
        beginning.
      most_targets: targets of the row that has most.
      padding: share of the rows that is padding.
      checksum: CRC-32 of all records.
      corpus: name of the corpus.
      tokenizer: CRC-32 of the tokenizer's file.
      chat_template: fingerprint of the template through which questions are asked; None for plain
        text.
      questions: number of questions in `questions.jsonl`; None in folders of older releases, which
        have no such file.
    """

    seq_len: Annotated[int, pydantic.Field(ge=2, le=MOST_SEQ_LEN)]
    rows: Annotated[int, pydantic.Field(ge=1, le=2**40)]
    cut: Count
    tokens: Count
    targets: Count
    most_targets: Count
    padding: Share
    checksum: Count
    tokenizer: Count | None = None
    prompts_cut: Count = 0
    corpus: str = ""
    questions: Count | None = None
    chat_template: str | None = None

    def __post_init__(self) -> None:
        if self.most_targets > self.seq_len:
            raise ValueError(
                f"most_targets={self.most_targets} is more than a row of {self.seq_len} tokens holds"
            )


def write_rows(
    folder: Path,
    examples: Iterable[Example],
    seq_len: int,
    *,
    corpus: str = "",
    tokenizer: int | None = None,
    questions: Sequence[Question] = (),
    chat_template: str | None = None,
) -> About:
    """Packs examples, in the order given, into rows of `seq_len` tokens in a new folder. Returns
    the contents of its `rows.json`.

    Reads the examples once and holds a few thousand open rows of them. The folder appears when it
    is whole.

    Args:
      corpus, tokenizer, chat_template: sources of the rows, for `rows.json`.
      questions: questions to ask after training on the rows.

    Raises:
      UserError: the folder is there already, cannot be written, or there is nothing to learn from.
    """
    writers = _extra("array_record.python.array_record_module")
    if folder.exists():
        raise UserError(f"{folder} is there already; pick another folder, or delete it")
    with new_folder(folder) as making:
        # any row is read without its neighbours
        writer = writers.ArrayRecordWriter(str(making / _ROWS), "group_size:1")
        counts, checksum, cuts = array.array("i"), 0, Cuts()  # 8 bytes a row

        def counted() -> Iterator[Example]:
            nonlocal cuts
            for example in examples:
                cuts += Cuts.of(example, seq_len)
                yield example

        for row in stream_rows(counted(), seq_len):
            record = _record(row, seq_len)
            writer.write(record)
            checksum = zlib.crc32(record, checksum)
            counts.extend(
                (
                    sum(len(p.inputs) for p in row),
                    sum(int(np.count_nonzero(p.weights)) for p in row),
                )
            )
        writer.close()
        if not counts:
            raise UserError("nothing to pack: no example has a token that the loss looks at")
        counts_Nx2 = np.array(counts, np.int32).reshape(-1, 2)
        np.save(making / _COUNTS, counts_Nx2)
        save_questions(making, questions)
        n_tokens, n_targets = map(int, counts_Nx2.sum(0, dtype=np.int64))
        about = About(
            seq_len=seq_len,
            rows=len(counts_Nx2),
            cut=cuts.texts,
            prompts_cut=cuts.prompts,
            tokens=n_tokens,
            targets=n_targets,
            most_targets=int(counts_Nx2[:, 1].max()),
            padding=1 - n_tokens / (len(counts_Nx2) * seq_len),
            checksum=checksum,
            corpus=corpus,
            tokenizer=tokenizer,
            questions=len(questions),
            chat_template=chat_template,
        )
        write_json(making / _ABOUT, dataclasses.asdict(about))
    return about


def longest_first(examples: Iterable[Example], window: int = 4096) -> Iterator[Example]:
    """Sorts each `window` of examples by length, so that first-fit leaves next to no room
    (first-fit decreasing)."""
    examples = iter(examples)
    while held := list(itertools.islice(examples, window)):
        yield from sorted(held, key=lambda example: -len(example.tokens))


def _record(row: Row, seq_len: int) -> bytes:
    arrays = {name: np.zeros(seq_len, dtype) for name, dtype in _FIELDS}
    start = 0
    for segment, piece in enumerate(row, 1):
        where = slice(start, start + len(piece.inputs))
        for name, values in zip(arrays, (*piece, segment), strict=True):
            arrays[name][where] = values
        start = where.stop
    return b"".join(array.tobytes() for array in arrays.values())


def _row(record: bytes, seq_len: int) -> Row:
    parts = np.split(np.frombuffer(record, np.uint8), len(_FIELDS))
    inputs, targets, weights, segments = (
        part.view(dtype) for part, (_, dtype) in zip(parts, _FIELDS, strict=True)
    )
    of_segment = [
        slice(*np.searchsorted(segments[: np.count_nonzero(segments)], [s, s + 1]))
        for s in range(1, int(segments.max()) + 1)
    ]
    return [Piece(inputs[where], targets[where], weights[where]) for where in of_segment]


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """A folder that `write_rows` has made; `about` is its `rows.json`."""

    folder: Path
    about: About

    @classmethod
    def open(cls, folder: Path) -> PackedRows:
        """Raises `UserError` if there is no such folder, or it is not whole."""
        if not (folder / _ABOUT).exists():
            raise UserError(
                f"{folder} holds no packed rows (no {_ABOUT} in it); scripts/pack_rows.py makes such a folder"
            )
        about = read(About, folder / _ABOUT, fix=_ANEW)
        # The library raises nothing for a file that is missing or cut short: it finds no rows in
        # it.
        found = (
            _extra("array_record.python.array_record_module")
            .ArrayRecordReader(str(folder / _ROWS))
            .num_records()
        )
        if found != about.rows:
            raise UserError(
                f"{folder / _ROWS} is missing or damaged: it holds {found} rows, {_ABOUT} says {about.rows}; {_ANEW}"
            )
        return cls(folder, about)

    def questions(self) -> list[Question]:
        """Returns the questions to ask after training on the rows. Raises `UserError` for a damaged
        file."""
        return load_questions(self.folder) if self.about.questions else []

    def batches(
        self, *, batch_rows: int, epochs: int, seed: int = 0, accumulate: int = 1, groups: int = 1
    ) -> PackedBatches:
        return PackedBatches(
            self,
            batch_rows=batch_rows,
            epochs=epochs,
            seed=seed,
            accumulate=accumulate,
            groups=groups,
        )


def _counts(packed: PackedRows) -> np.ndarray:
    path, about = packed.folder / _COUNTS, packed.about
    try:
        counts_Nx2 = np.load(path, mmap_mode="r")
        wrong = "" if counts_Nx2.shape == (about.rows, 2) else f"it is of shape {counts_Nx2.shape}"
        if not wrong and tuple(map(int, counts_Nx2.sum(0, dtype=np.int64))) != (
            about.tokens,
            about.targets,
        ):
            wrong = f"its sums are not those of {_ABOUT}"
    except (OSError, ValueError, EOFError) as error:
        wrong = str(error).splitlines()[0]
    if wrong:
        raise UserError(f"{path} is missing or damaged ({wrong}); {_ANEW}")
    return counts_Nx2


class PackedBatches:
    """The batches of a whole run, as in `Batches`. Each call reads only the rows that it lays
    out."""

    def __init__(
        self,
        packed: PackedRows,
        *,
        batch_rows: int,
        epochs: int,
        seed: int,
        accumulate: int,
        groups: int,
    ):
        check_divides(batch_rows, accumulate, groups)
        self.seq_len, self.batch_rows, self.epochs = packed.about.seq_len, batch_rows, epochs
        self.accumulate, self.groups = accumulate, groups
        # A bound that holds for any order of the rows.
        self.capacity = rounded_capacity(
            packed.about.most_targets * (batch_rows // accumulate // groups)
        )
        self.cuts = Cuts(packed.about.cut, packed.about.prompts_cut)
        self._counts_Nx2 = _counts(packed)
        self._order = (
            _extra("grain").MapDataset.range(packed.about.rows).seed(seed).shuffle().repeat(epochs)
        )
        # Asked for several times a step, while shuffling costs up to 3 ms an index where rows are
        # few (it walks through 2^16 numbers).
        self.row_numbers = functools.lru_cache(16)(self._row_numbers)
        self._file = packed.folder / _ROWS
        self._reader = _extra("array_record.python.array_record_module").ArrayRecordReader(
            str(self._file)
        )

    def __len__(self) -> int:
        return -(-len(self._order) // self.batch_rows)

    def __getitem__(self, step: int) -> Batch:
        return self.share(step, list(range(self.groups)))

    def _row_numbers(self, step: int) -> tuple[int, ...]:
        """The rows of a step: fewer than `batch_rows` in the very last one."""
        if not 0 <= step < len(self):
            raise IndexError(step)
        return tuple(
            int(self._order[i])
            for i in range(
                step * self.batch_rows, min((step + 1) * self.batch_rows, len(self._order))
            )
        )

    def share(self, step: int, groups: Sequence[int]) -> Batch:
        """The rows of some groups of a batch, as a batch of their own. Rows of other groups are not
        read.

        Raises:
          UserError: the file is damaged there.
        """
        numbers = self.row_numbers(step)
        rows_a_group = self.batch_rows // self.accumulate // self.groups
        wanted = [
            at for at in range(len(numbers)) if at // rows_a_group % self.groups in set(groups)
        ]
        try:
            records = self._reader.read([numbers[at] for at in wanted]) if wanted else []
        except (RuntimeError, ValueError) as error:  # the records' own checksums do not match
            raise UserError(
                f"{self._file} is damaged: the rows of step {step + 1} cannot be read; {_ANEW}"
            ) from error
        rows: list[Row] = [[]] * len(numbers)
        for at, record in zip(wanted, records, strict=True):
            rows[at] = _row(record, self.seq_len)
        return share_of(rows, groups, self)

    def n_tokens(self, step: int) -> int:
        return int(self._counts_Nx2[self.row_numbers(step), 0].sum())

    def n_targets(self, steps: int) -> int:
        return sum(int(self._counts_Nx2[self.row_numbers(step), 1].sum()) for step in range(steps))
