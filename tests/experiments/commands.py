"""Command lines of the experiments, and their results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Small enough for seconds, long enough that a training can be interrupted.
ASKING = ("--k=2", "--engine=exact", "--max_new_tokens=4", "--hyde_tokens=6")
SETTINGS = (
    *(
        "--epochs=40",
        "--rank=4",
        "--lr_lora=1e-2",
        "--lr_full=3e-3",
        "--batch_rows=2",
        "--seq_len=64",
        "--checkpoint_every=10",
    ),
    *ASKING,
    "--latency_queries=1",
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str
    operations: int = 0


@dataclasses.dataclass(frozen=True)
class World:
    """Folders of a tiny language model, a tiny encoder and a tiny corpus."""

    root: Path

    @property
    def gemma(self) -> Path:
        return self.root / "gemma"

    @property
    def bert(self) -> Path:
        return self.root / "bert"

    @property
    def corpus(self) -> Path:
        return self.root / "corpus"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    def flags(self, **changes: object) -> list[str]:
        """The models, the corpus and where runs go; `changes` replaces one, or leaves it out
        (None)."""
        values = {
            "model": self.gemma,
            "embedder": self.bert,
            "corpus": self.corpus,
            "runs": self.runs,
            **changes,
        }
        return [f"--{name}={value}" for name, value in values.items() if value is not None]


Command = Callable[..., Outcome]
"""`command(*arguments, hidden=(), stdin="")` runs a main to its end; `hidden` are modules that it
shall not find.

`kill=(folder, n)` ends it before its n-th file operation in that folder, and counts them; n = 0:
only counts."""


def refused(outcome: Outcome) -> str:
    """The one line that a bad input gets."""
    assert outcome.code == 2, outcome.out + outcome.err
    errors = [line for line in outcome.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert outcome.err.rstrip().endswith(errors[0])
    assert "Traceback" not in outcome.err
    return errors[0]
