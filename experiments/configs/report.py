"""The configuration of `experiments.report`."""

from __future__ import annotations

import dataclasses

from kafjax.core.config import Config, option


@dataclasses.dataclass(frozen=True)
class Report(Config):
    """A table of many runs, with paired tests."""

    folder: tuple[str, ...] = option(
        (),
        "Folders of runs, or folders that hold such; separated by commas.",
        path=True,
        bucket=True,
    )
    baseline: str | None = option(
        None,
        "Arm that others are tested against, by its settings: method=lora,rank=4 (default: no tests).",
    )
    choose: tuple[str, ...] = option(
        (),
        "Settings whose best values are chosen for each arm, on development subjects; or else on one half of the subjects, "
        "and the report is about the other half.",
    )
    most_forgotten: float | None = option(
        None,
        "With --choose: pass over values that forget more of held-out prose, in nats a token.",
        least=0,
    )
    margin: float = option(
        0.05,
        "Differences within so much count as equal, if shown by two one-sided tests.",
        above=0,
        below=1,
    )
    wandb_project: str | None = option(
        None,
        "ENTITY/PROJECT of wandb whose finished runs are read, too: their settings and losses.",
    )
    out: str = option("report", "Folder that the report is written to.", path=True)
