"""Prompts on disk and in the report, each line once: those of a method begin with the same worked
examples and draw on the same passages.

    {"lines": ["Question: ...", ...], "prompts": {"q1": [[0, 1, 4]], ...}}     by the question's id, one a call
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from kafjax.core.errors import UserError
from kafjax.core.rundir import write_jsonl
from kafjax.core.schema import Count, read


@dataclasses.dataclass
class Lines:
    """Distinct lines, in the order in which they were met."""

    places: dict[str, int] = dataclasses.field(default_factory=dict)

    def add(self, text: str) -> list[int]:
        """Returns the places of the lines of a text; joined by line feeds they are the text."""
        return [self.places.setdefault(line, len(self.places)) for line in text.split("\n")]


@dataclasses.dataclass(frozen=True)
class _Stored:
    """Contents of a file of prompts."""

    lines: list[str]
    prompts: dict[str, list[list[Count]]]


def write_prompts(path: Path, prompts: Mapping[str, Sequence[str]]) -> None:
    """Writes prompts by the ids of their questions. Raises `UserError` if it cannot be written."""
    lines = Lines()
    placed = {id: [lines.add(text) for text in texts] for id, texts in prompts.items()}
    write_jsonl(path, [{"lines": list(lines.places), "prompts": placed}])


def read_prompts(path: Path, *, fix: str = "") -> dict[str, tuple[str, ...]]:
    """Reads a file of `write_prompts`; nothing where there is none, as earlier releases wrote none.

    Raises:
      UserError: naming the file and `fix`, if it is damaged.
    """
    if not path.exists():
        return {}
    stored = read(_Stored, path, fix=fix)
    if any(
        at >= len(stored.lines)
        for texts in stored.prompts.values()
        for text in texts
        for at in text
    ):
        raise UserError(f"{path}: prompts: a line is missing{'; ' + fix if fix else ''}")
    return {
        id: tuple("\n".join(stored.lines[at] for at in text) for text in texts)
        for id, texts in stored.prompts.items()
    }
