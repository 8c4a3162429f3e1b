"""Batches of prompts: few shapes, so that few programs are compiled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

BATCH_TOKENS = 8192


def bucket(length: int) -> int:
    """Returns the smallest power of two, from 32 on, that holds `length`."""
    return max(32, 1 << (length - 1).bit_length())


def rows_of(length: int, batch: int, batch_tokens: int) -> int:
    """Number of prompts of up to `length` tokens that are run at a time: at most `batch`, one at
    least.

    A shape of prompts is a program, so lengths of one bucket have one number of rows.
    """
    return max(1, min(batch, batch_tokens // bucket(length)))


def batches(
    by_length: Sequence[int], lengths: Sequence[int], batch: int, batch_tokens: int
) -> Iterator[list[int]]:
    """Divides prompts, given shortest first by their numbers, into batches of rows that `rows_of`
    allows.

    The padded prompts of a batch have `batch_tokens` tokens at most, unless it is a single one.
    """
    made: list[int] = []
    for i in by_length:
        if made and len(made) >= rows_of(lengths[i], batch, batch_tokens):
            yield made
            made = []
        made.append(i)
    if made:
        yield made


def padded(token_lists: list[list[int]], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Makes tokens `[rows, bucket]` padded on the right and their lengths; missing rows repeat the
    first."""
    token_lists = token_lists + [token_lists[0]] * (rows - len(token_lists))
    tokens = np.zeros((rows, bucket(max(map(len, token_lists)))), np.int32)
    for row, given in zip(tokens, token_lists, strict=True):
        row[: len(given)] = given
    return tokens, np.array([len(given) for given in token_lists], np.int32)
