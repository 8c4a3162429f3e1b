"""Embedding part by part: what is whole is not embedded again, what is not its own is not taken."""

from __future__ import annotations

import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from kafjax.retrieval import parts
from kafjax.retrieval.parts import embed_in_parts
from tests import compiling, tiny
from tests.retrieval import killed_embedding

TEXTS = [f"text {i}" for i in range(25)]


class Killed(BaseException):
    pass


def embedder(fingerprint: str = "a", dies_at: int | None = None) -> types.SimpleNamespace:
    """Vectors that depend on the text alone; `embedded` has what was asked for."""
    embedded: list[str] = []

    def embed_documents(texts, advance):
        if dies_at is not None and len(embedded) >= dies_at:
            raise Killed
        embedded.extend(texts)
        advance(len(texts))
        return np.array([[len(text), float(text.split()[1])] for text in texts], np.float32)

    return types.SimpleNamespace(
        fingerprint=fingerprint, dimension=2, embed_documents=embed_documents, embedded=embedded
    )


@pytest.fixture(autouse=True)
def short_parts(monkeypatch):
    monkeypatch.setattr(parts, "PART", 10)


@pytest.mark.parametrize("dies_at", [0, 10, 20])
def test_a_killed_embedding_goes_on_at_the_part_that_was_not_whole(tmp_path, dies_at):
    expected = embedder().embed_documents(TEXTS, lambda n: None)
    with pytest.raises(Killed):
        embed_in_parts(embedder(dies_at=dies_at), TEXTS, tmp_path)
    again, seen = embedder(), []
    vectors = embed_in_parts(again, TEXTS, tmp_path, seen.append)
    np.testing.assert_array_equal(vectors, expected)
    assert again.embedded == TEXTS[dies_at:]
    assert sum(seen) == len(TEXTS)


def test_parts_of_other_texts_or_of_another_embedder_are_not_taken(tmp_path):
    embed_in_parts(embedder(), TEXTS, tmp_path)
    other = embedder("b")
    embed_in_parts(other, TEXTS, tmp_path)
    assert other.embedded == TEXTS
    changed = embedder()
    embed_in_parts(changed, [*TEXTS[:12], "text 99", *TEXTS[13:]], tmp_path)
    assert changed.embedded == [*TEXTS[10:12], "text 99", *TEXTS[13:20]]


def test_a_damaged_part_is_embedded_again(tmp_path):
    embed_in_parts(embedder(), TEXTS, tmp_path)
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:-3])
    again = embedder()
    expected = embedder().embed_documents(TEXTS, lambda n: None)
    np.testing.assert_array_equal(embed_in_parts(again, TEXTS, tmp_path), expected)
    assert again.embedded == TEXTS


@pytest.mark.multiprocess
def test_a_killed_process_leaves_whole_parts_that_the_next_one_takes(tmp_path, monkeypatch):
    bert, kept = str(tiny.write_bert(tmp_path / "bert")), tmp_path / "parts"
    killed = subprocess.run(
        [sys.executable, Path(__file__).parent / "killed_embedding.py", bert, kept],
        env=compiling.environment(),
    )
    assert killed.returncode == -signal.SIGKILL
    texts, n = killed_embedding.TEXTS, killed_embedding.PART
    assert len(list(kept.glob("*.npy"))) == 2
    monkeypatch.setattr(parts, "PART", n)
    encoder = killed_embedding.open_embedder(bert)
    expected, embed, asked = encoder.embed_documents(texts), encoder.embed_documents, []

    def counted(texts, advance):
        asked.extend(texts)
        return embed(texts, advance)

    monkeypatch.setattr(encoder, "embed_documents", counted)
    vectors = embed_in_parts(encoder, texts, kept)
    assert asked == texts[2 * n :]
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
