"""The card of a paper, written before anything is run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.configs.paper import TINY
from experiments.report import trials_under
from kafjax.core.rundir import read_jsonl, read_object
from kafjax.core.schema import read
from kafjax.evaluation.arms import Arm, arms_of
from kafjax.evaluation.claims import Claim
from kafjax.evaluation.table import Table
from kafjax.training.took import Took
from launch.spec import Sweep


def read_runs(folder: Path) -> list[Arm]:
    """Reads the arms of all finished runs in a folder."""
    return arms_of(trials_under(folder))


def finished(folder: Path) -> Iterator[tuple[dict[str, Any], Took, list[dict[str, Any]]]]:
    """Yields the settings of each finished training in a folder, what it took, and a row a step."""
    for file in sorted(folder.glob("*/result.json")):
        rows = read_jsonl(file.with_name("metrics.jsonl"))
        yield read_object(file.with_name("config.json")), read(Took, file), rows


def nothing(scale: str) -> None:
    """Prepares nothing."""


@dataclasses.dataclass(frozen=True)
class Sabotage:
    """A change that must turn verdicts: where one is still `shown`, the claim measures nothing.

    Attributes:
      what: what is broken, in words.
      change: breaks the runs.
      turns: texts of the claims that may no longer be shown.
    """

    what: str
    change: Callable[[Sweep], Sweep]
    turns: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Card:
    """A paper to reproduce.

    Attributes:
      name: of the module, and of the folder in docs/papers.
      papers: citations with their arXiv numbers.
      claim: what the paper found, in a sentence or two.
      design: what is run at each scale, in words.
      expected: what is expected at `tiny`, also what should fail there and why.
      published: the paper's own numbers, each with its table or figure.
      sweep: the runs of a scale.
      claims: inequalities, in the paper's order.
      figure: draws the arms to a file.
      prepare: makes what the runs of a scale begin from, where it is missing; called first.
      read: reads the arms from the folder of the runs.
      sabotages: by name, as `--sabotage=NAME`.
    """

    name: str
    papers: tuple[str, ...]
    claim: str
    design: Mapping[str, str]
    expected: str
    published: Table
    sweep: Callable[[str], Sweep]
    claims: tuple[Claim, ...]
    figure: Callable[[Sequence[Arm], Path], None]
    prepare: Callable[[str], None] = nothing
    read: Callable[[Path], list[Arm]] = read_runs
    sabotages: Mapping[str, Sabotage] = dataclasses.field(default_factory=dict)

    def told(self, scale: str) -> str:
        """Writes the card as it stands above the results of a scale."""
        lines = [
            f"# {self.name}",
            "",
            *(f"- {paper}" for paper in self.papers),
            "",
            f"**Claim.** {self.claim}",
            "",
            f"**Design at {scale}.** {self.design[scale]}",
            "",
            f"**Expected at {TINY}, written before the run.** {self.expected}",
        ]
        return "\n".join(lines) + "\n"
