"""The configuration of `scripts/pack_rows.py`."""

from __future__ import annotations

import dataclasses

from experiments.configs.shared import chat_flag
from kafjax.core.config import Config, nested, option
from kafjax.corpus import CorpusConfig
from kafjax.methods import TRAIN


@dataclasses.dataclass(frozen=True)
class PackRows(Config):
    """Rows of tokens on disk."""

    corpus: CorpusConfig = nested(CorpusConfig(held_out=0), without=("held_out", "chunk"))
    model: str = option(
        "gemma3-270m", "Language model whose tokenizer is used: gemma3-270m, a folder, or ORG/NAME."
    )
    chat: str = chat_flag()
    seq_len: int = option(
        TRAIN.seq_len, "Tokens per row; longer texts are cut into pieces.", least=2, most=2**22
    )
    seed: int = option(0, "Seed of a generated corpus.", least=0, most=2**31 - 1)
    out: str | None = option(None, "Folder to make.", record=False, path=True)
