"""`--chat`: what is asked through a template is another run than what is asked in plain text, and
old runs stay what they were."""

from __future__ import annotations

import json
import re

import pytest

from experiments.configs.pack_rows import PackRows
from kafjax.core.config import changed
from kafjax.core.rundir import read_json
from scripts import pack_rows
from tests import tiny
from tests.experiments.commands import SETTINGS, refused

QUESTION = "--question=Where was Mira Toll born?"
pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return tiny.write_chat(tmp_path_factory.mktemp("chat") / "gemma", "gemma")


def n_tokens(outcome):
    assert outcome.code == 0, outcome.err
    return re.search(r"tokens +(\d+) prompt", outcome.out)[1]


def test_an_instruct_model_is_compared_and_asked_through_its_template(
    compare, answer, world, gemma, tmp_path
):
    flags = [
        *world.flags(model=gemma, runs=tmp_path),
        *SETTINGS,
        "--methods=base,lora",
        "--epochs=1",
    ]
    for name, chat in (("turns", []), ("plain", ["--chat=off"])):
        done = compare(*flags, *chat, f"--name={name}")
        assert done.code == 0, done.err
    turns, plain = (read_json(tmp_path / name / "config.json") for name in ("turns", "plain"))
    assert "chat_template" in turns and "chat_template" not in plain
    assert "holds a run with chat_template=" in refused(compare(*flags, "--name=plain"))

    asked = n_tokens(answer(f"--run={tmp_path / 'turns'}", "--method=lora", QUESTION))
    as_text = n_tokens(answer(f"--run={tmp_path / 'plain'}", "--method=lora", QUESTION))
    assert asked != as_text
    # of a release before
    (tmp_path / "plain" / "config.json").write_text(
        json.dumps({key: plain[key] for key in plain if key != "chat"})
    )
    assert n_tokens(answer(f"--run={tmp_path / 'plain'}", "--method=lora", QUESTION)) == as_text
    (tmp_path / "turns" / "config.json").write_text(
        json.dumps({**turns, "chat_template": "another"})
    )
    assert "chat template" in refused(answer(f"--run={tmp_path / 'turns'}", QUESTION))


def test_what_a_finetuned_instruct_model_shows_is_asked_through_its_template(
    finetune, world, gemma, tmp_path
):
    flags = world.flags(model=gemma, runs=tmp_path, embedder=None)
    done = finetune(*flags, "--epochs=1", "--rank=4", "--seq_len=64", "--name=tuned")
    assert done.code == 0, done.err
    assert "chat_template" in read_json(tmp_path / "tuned" / "config.json")


def test_rows_are_packed_and_trained_in_one_form(finetune, world, gemma, tmp_path):
    pytest.importorskip("array_record")
    packed = changed(
        PackRows(),
        model=str(gemma),
        corpus=str(world.corpus),
        seq_len=64,
        out=str(tmp_path / "rows"),
    )
    pack_rows.run(packed)
    flags = [
        *world.flags(model=gemma, runs=tmp_path / "runs", embedder=None),
        f"--rows={tmp_path / 'rows'}",
        "--rank=4",
        "--epochs=1",
    ]
    assert "was packed with another --chat" in refused(finetune(*flags, "--chat=off"))
    assert not (tmp_path / "runs").exists()


def test_a_model_without_an_eos_is_asked_for_one_before_anything_is_written(
    compare, finetune, world, tmp_path
):
    model = tiny.write_gemma(tmp_path / "gemma", eos_token_id=None)
    for main, embedder in ((compare, world.bert), (finetune, None)):
        assert "no 'eos_token_id'" in refused(
            main(*world.flags(model=model, runs=tmp_path / "runs", embedder=embedder))
        )
    assert not (tmp_path / "runs").exists()


def test_a_template_that_is_asked_for_and_is_not_there_is_told(compare, finetune, world, tmp_path):
    for main, flags in (
        (compare, world.flags(runs=tmp_path / "runs")),
        (finetune, world.flags(runs=tmp_path / "runs", embedder=None)),
    ):
        assert (
            "--chat=on: " in (line := refused(main(*flags, "--chat=on")))
            and "has no chat template" in line
        )
    assert not (tmp_path / "runs").exists()
