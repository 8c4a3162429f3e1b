"""Settings of every program in experiments/papers."""

from __future__ import annotations

import dataclasses

from kafjax.core.config import Config, option

TINY, GPU, FULL = "tiny", "gpu", "full"
SCALES = (TINY, GPU, FULL)


@dataclasses.dataclass(frozen=True)
class Paper(Config):
    """One paper, at one scale."""

    scale: str = option(
        TINY,
        "Size: tiny (two cores, half an hour), gpu (one GPU, an hour), full (the paper's own).",
        choices=SCALES,
    )
    folder: str | None = option(
        None,
        "Folder of the runs (default: papers/NAME-SCALE); the same command goes on there.",
        path=True,
    )
    dry_run: bool = option(False, "Show the card and a line a run with estimates, and stop.")
    raw: str | None = option(
        None,
        "File raw.jsonl.gz of an earlier run: judge its answers again, and run nothing.",
        path=True,
    )
    sabotage: str | None = option(
        None, "Break the experiment in the way of this name: its verdicts must turn."
    )
    out: str | None = option(
        None, "Folder that the results are written to (default: beside the runs).", path=True
    )
