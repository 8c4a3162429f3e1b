"""Settings of generation, with their only defaults."""

from __future__ import annotations

import dataclasses

from kafjax.core.config import Config, option


@dataclasses.dataclass(frozen=True)
class GenerationConfig(Config):
    """Limits on the length of answers and on the questions answered at a time."""

    max_new_tokens: int = option(12, "Generation: longest answer in tokens.", least=1, most=2**20)
    hyde_tokens: int = option(24, "HyDE: longest made-up passage in tokens.", least=1, most=2**20)
    batch: int = option(32, "Generation: questions answered at a time.", least=1, most=2**16)
