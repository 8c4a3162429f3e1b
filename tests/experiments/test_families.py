"""The mains on folders of other families: a Llama with a BOS and a head of its own, and a Qwen that
puts nothing in front."""

from __future__ import annotations

from pathlib import Path

import pytest

from kafjax import hub
from kafjax.core.rundir import read_jsonl
from kafjax.prompts import prompt
from tests import tiny
from tests.experiments.commands import Outcome, refused

QUESTION = "Where was Mira Toll born?"


def shown(asked: Outcome) -> dict[str, str]:
    assert asked.code == 0, asked.err
    return {line[:10].strip(): line[10:] for line in asked.out.splitlines() if line[:10].strip()}


def n_tokens(model: Path, *, bos: int, prefix: str, then: str) -> int:
    """Counts the tokens of BOS and the two parts, which are tokenized as in one text."""
    encode = hub.tokenizer(str(model)).encode
    parts = [
        token for part in (prefix, then) for token in encode(part, add_special_tokens=False).ids
    ]
    whole = encode(prefix + then).ids
    assert whole[bos:] == parts and whole[:bos] == [2] * bos
    return len(whole)


@pytest.mark.multiprocess
def test_a_llama_is_trained_and_asked(finetune, answer, world, tmp_path):
    model = tiny.write_llama(tmp_path / "llama")
    settings = (
        "--method=lora",
        "--rank=8",
        "--lr=1e-2",
        "--epochs=15",
        "--batch_rows=4",
        "--seq_len=64",
        "--checkpoint_every=0",
    )
    trained = finetune(
        *world.flags(model=model, runs=tmp_path, embedder=None), *settings, "--name=tuned"
    )
    assert trained.code == 0, trained.err
    losses = [row["loss"] for row in read_jsonl(tmp_path / "tuned" / "metrics.jsonl")]
    assert losses[-1] < 0.7 * losses[0]
    asked = shown(
        answer(
            f"--run={tmp_path / 'tuned'}",
            f"--embedder={world.bert}",
            "--max_new_tokens=4",
            f"--question={QUESTION}",
        )
    )
    expected = n_tokens(
        model, bos=1, prefix=prompt.closed_book_prefix(), then=prompt.closed_book(QUESTION)
    )
    assert asked["tokens"].startswith(f"{expected} prompt ")


@pytest.mark.multiprocess
def test_a_qwen_reads_passages(answer, world, tmp_path):
    model = tiny.write_qwen(tmp_path / "qwen")
    passage = tiny.documents()[0]["contents"]
    # Asked in the words of the passage: to any encoder, a random one too, it is the nearest.
    flags = ("--k=1", "--engine=exact", "--max_new_tokens=4", f"--question={passage}")
    asked = shown(answer(*world.flags(model=model, runs=tmp_path / "runs"), *flags))
    assert asked["passages"].strip() == f"1. [doc0#0] {passage}"
    expected = n_tokens(
        model, bos=0, prefix=prompt.reading_prefix(1), then=prompt.reading(passage, [passage])
    )
    assert asked["tokens"].startswith(f"{expected} prompt ")


@pytest.mark.multiprocess
def test_a_tokenizer_of_another_model_is_told(finetune, world, tmp_path):
    model = tiny.write_qwen(tmp_path / "qwen", vocab_size=300)
    outcome = finetune(*world.flags(model=model, runs=tmp_path / "runs", embedder=None), "--rank=4")
    assert "the tokenizer is not this model's: token" in refused(
        outcome
    ) and "vocabulary of 300" in refused(outcome)
    assert not (tmp_path / "runs").exists()
