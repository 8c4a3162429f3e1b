"""The configuration of `experiments.table`."""

from __future__ import annotations

import dataclasses

from kafjax.core.config import Config, option


@dataclasses.dataclass(frozen=True)
class SideBySide(Config):
    """Comparisons side by side."""

    out: str = option(
        "table", "Folder that table.md, table.csv and plots are written to.", path=True
    )
