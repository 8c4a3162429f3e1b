"""Embeds texts part by part and is killed in the third part.

python killed_embedding.py ENCODER PARTS
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from kafjax import hub
from kafjax.retrieval import Embedder, parts

PART = 20
TEXTS = [f"Mira Toll keeps {i} bees." for i in range(4 * PART)]


def open_embedder(folder: str) -> Embedder:
    return Embedder(*hub.load(folder), hub.tokenizer(folder), batch=4)


if __name__ == "__main__":
    encoder, kept = sys.argv[1:]
    done = 0

    def advance(n: int) -> None:
        global done
        done += n
        if done > 2 * PART:
            os.kill(os.getpid(), signal.SIGKILL)

    parts.PART = PART
    parts.embed_in_parts(open_embedder(encoder), TEXTS, Path(kept), advance)
