"""Embedding a large corpus part by part: a part that is whole on disk is not embedded again after a
kill."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kafjax.core.progress import Advance, say, unshown
from kafjax.core.rundir import write_atomic
from kafjax.retrieval.embed import Embedder

PART = 16_384  # texts


def embed_in_parts(
    embedder: Embedder, texts: Sequence[str], folder: Path, advance: Advance = unshown
) -> np.ndarray:
    """Embeds passages, float32 `[N, D]`, and keeps each part of `PART` of them in `folder` until
    the caller deletes it.

    A part is known by a hash of the embedder and its texts, so that a changed corpus or embedder
    finds nothing of another one. A damaged file counts as none. Raises `UserError` as
    `Embedder.embed` does, and if the disk refuses.
    """
    vectors_NxD = np.empty((len(texts), embedder.dimension), np.float32)
    n_kept = 0
    for start in range(0, len(texts), PART):
        part = texts[start : start + PART]
        file = folder / f"{_name(embedder.fingerprint, part)}.npy"
        vectors_PxD = _read(file, (len(part), embedder.dimension))
        if vectors_PxD is None:
            vectors_PxD = embedder.embed_documents(part, advance)
            written = io.BytesIO()
            np.save(written, vectors_PxD, allow_pickle=False)
            write_atomic(file, written.getvalue())
        else:
            n_kept += len(part)
            advance(len(part))
        vectors_NxD[start : start + len(part)] = vectors_PxD
    if n_kept:
        say("embedding", f"{n_kept} of {len(texts)} passages were embedded before a break")
    return vectors_NxD


def _name(fingerprint: str, texts: Sequence[str]) -> str:
    digest = hashlib.blake2b(fingerprint.encode(), digest_size=16)
    for text in texts:
        data = text.encode(errors="surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def _read(file: Path, shape: tuple[int, int]) -> np.ndarray | None:
    try:
        found = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == shape and found.dtype == np.float32 else None
