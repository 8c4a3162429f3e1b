"""Raw results of a study, small enough to commit: which question each trial answered right, and its
numbers. A compressed line a trial.

The texts of questions and replies are not kept; a checksum of each question tells whether two
trials were asked the same.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kafjax.core.errors import UserError
from kafjax.core.records import Prediction
from kafjax.core.rundir import read_bytes, write_atomic
from kafjax.core.schema import checked
from kafjax.evaluation.arms import METHOD, Arm, Trial, arms_of
from kafjax.evaluation.clustered import subject_of

_GOLD = "gold"
MOST = 100_000_000
"""Bytes of a file."""


@dataclasses.dataclass(frozen=True)
class RawTrial:
    """A line of the file. `answers` are [id, checksum of the question, split, subject, 1 if right,
    1 if a gold passage was found]; the other fields are those of a `Trial`."""

    settings: dict[str, Any]
    seed: int
    final_loss: float | None
    forgotten: float | None
    numbers: dict[str, float]
    curve: list[float]
    answers: list[list[Any]]


def write(path: Path, arms: Sequence[Arm]) -> None:
    """Writes all trials of some arms."""
    trials = [trial for arm in arms for trial in arm.trials.values()]
    # only what tells arms apart: the rest is in the spec of the sweep
    names = list(dict.fromkeys(name for arm in arms for name in arm.settings))
    lines = "".join(f"{json.dumps(dataclasses.asdict(_raw(t, names)))}\n" for t in trials)
    # without the time, so that the same results are the same file
    write_atomic(path, gzip.compress(lines.encode(), mtime=0))


def read(path: Path) -> list[Arm]:
    """Reads arms back. They score as those that were written. Raises `UserError` for a broken
    file."""
    try:
        rows = [json.loads(line) for line in gzip.decompress(read_bytes(path, MOST)).splitlines()]
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"{path} holds no raw results: {error}") from error
    return arms_of([_trial(checked(RawTrial, row, path), path) for row in rows])


def is_found(prediction: Prediction) -> bool:
    """True if a gold passage stood in the prompt."""
    return not set(prediction.gold_passages).isdisjoint(prediction.passages)


def _raw(trial: Trial, names: Sequence[str]) -> RawTrial:
    answers = [
        [
            p.id,
            f"{zlib.crc32(p.question.encode()):08x}",
            p.split,
            subject_of(p),
            int(p.correct),
            int(is_found(p)),
        ]
        for p in trial.predictions
    ]
    settings = {name: trial.settings.get(name) for name in names}
    return RawTrial(
        settings,
        trial.seed,
        trial.final_loss,
        trial.forgotten,
        dict(trial.numbers),
        [float(f"{loss:.5g}") for loss in trial.curve],
        answers,
    )


def _trial(row: RawTrial, path: Path) -> Trial:
    method = str(row.settings.get(METHOD, ""))
    predictions = []
    for id, question, split, subject, right, found in row.answers:
        passages = (_GOLD,) if found else ()
        predictions.append(
            Prediction(
                id,
                method,
                split,
                question,
                "",
                (),
                passages=passages,
                gold_passages=passages,
                subject=subject,
                correct=bool(right),
            )
        )
    return Trial(
        row.settings,
        row.seed,
        predictions,
        row.final_loss,
        str(path),
        path,
        forgotten=row.forgotten,
        numbers=row.numbers,
        curve=row.curve,
    )
