"""Fine-tuning from the command line in two processes, interrupted by a real SIGTERM and without."""

from __future__ import annotations

import json
import shutil
import signal

import numpy as np
import pytest
import safetensors.numpy

from kafjax import hub
from kafjax.corpus.folder import load_folder
from kafjax.methods.examples import stream_examples
from kafjax.training.packed import tokenizer_checksum, write_rows
from tests import tiny
from tests.multiprocess.launch import FINETUNE

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tiny.write_gemma(folder / "gemma")
    tiny.write_corpus(folder / "corpus")
    return folder


@pytest.fixture
def flags(world, tmp_path):
    """All at one learning rate, long enough to be interrupted."""
    return [
        *(
            f"--model={world / 'gemma'}",
            f"--corpus={world / 'corpus'}",
            f"--runs={tmp_path}",
            "--rank=4",
            "--lr=1e-2",
            "--warmup=0",
        ),
        *("--batch_rows=2", "--seq_len=64", "--checkpoint_every=10", "--steps=30"),
    ]


def rows(run) -> dict[int, float]:
    """Loss by step. After a resume a step may stand there twice, with the same loss."""
    found: dict[int, float] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert found.setdefault(row["step"], row["loss"]) == row["loss"], row
    return found


def test_sigterm_on_one_process_saves_in_all_and_the_resume_goes_on_as_if_nothing_had_been(
    launcher, flags, tmp_path
):
    launcher.run(FINETUNE, [*flags, "--name=straight"], 2, tmp_path / "log")
    straight, whole = tmp_path / "straight", rows(tmp_path / "straight")
    assert sorted(whole) == list(range(1, 31)) and whole[30] < whole[1]
    assert len((straight / "metrics.jsonl").read_text().splitlines()) == 30  # one process writes

    run = tmp_path / "interrupted"
    crowd = launcher.start(
        FINETUNE, [*flags, "--name=interrupted"], 2, tmp_path / "log_interrupted"
    )
    crowd.wait_until(lambda: (run / "metrics.jsonl").exists(), "the first step")
    crowd.signal(1, signal.SIGTERM)
    outcomes = crowd.ended()
    assert [outcome.code for outcome in outcomes] == [143, 143], outcomes
    told = [
        line
        for outcome in outcomes
        for line in outcome.err.splitlines()
        if line.startswith("stopped by SIGTERM: lora: saved step ")
    ]
    assert len(told) == 2 and told[0] == told[1]
    saved = int(told[0].split("saved step ")[1].split()[0])
    assert (
        1 <= saved < 30 and (run / "checkpoints" / str(saved)).exists() and max(rows(run)) == saved
    )
    shutil.copytree(run, tmp_path / "moved")

    outcomes = launcher.run(FINETUNE, [*flags, "--name=interrupted"], 2, tmp_path / "log_resumed")
    assert f"resuming after step {saved} of 30" in outcomes[0].err
    assert rows(run) == whole
    # the exact next batch: no step twice
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 30
    ours, expected = (
        safetensors.numpy.load_file(folder / "adapter.safetensors") for folder in (run, straight)
    )
    assert all(np.array_equal(ours[name], expected[name]) for name in expected) and set(
        ours
    ) == set(expected)

    launcher.run(FINETUNE, [*flags, "--name=moved"], 1, tmp_path / "log_moved")
    moved = rows(tmp_path / "moved")
    np.testing.assert_allclose(
        [moved[step] for step in whole], [whole[step] for step in whole], rtol=2e-4
    )
    again = launcher.run(FINETUNE, [*flags, "--name=moved"], 2, tmp_path / "log_again")
    assert (
        "finished earlier" in again[0].err
        and "Trained" in again[0].out
        and "Trained" not in again[1].out
    )


def test_one_process_saves_at_sigterm_too(launcher, flags, tmp_path):
    run = tmp_path / "one"
    crowd = launcher.start(FINETUNE, [*flags, "--name=one", "--steps=2000"], 1, tmp_path / "log")
    crowd.wait_until(lambda: (run / "metrics.jsonl").exists(), "the first step")
    crowd.signal(0, signal.SIGTERM)
    (outcome,) = crowd.ended()
    assert outcome.code == 143, outcome
    saved = int(outcome.err.split("saved step ")[1].split()[0])
    assert (run / "checkpoints" / str(saved)).exists() and max(rows(run)) == saved


def test_full_fine_tuning_of_two_processes_is_that_of_one(launcher, flags, tmp_path):
    arguments = [*flags, "--method=full", "--lr=1e-3", "--steps=4", "--checkpoint_every=0"]
    for n in (1, 2):
        launcher.run(FINETUNE, [*arguments, f"--name=by{n}"], n, tmp_path / f"log{n}")
    one, two = rows(tmp_path / "by1"), rows(tmp_path / "by2")
    np.testing.assert_allclose([two[step] for step in one], list(one.values()), rtol=1e-5)
    one, two = (
        safetensors.numpy.load_file(tmp_path / name / "weights.safetensors")
        for name in ("by1", "by2")
    )
    for name, expected in one.items():
        np.testing.assert_allclose(two[name], expected, atol=1e-5, err_msg=name)


def test_packed_rows_go_to_two_processes_as_to_one(launcher, world, flags, tmp_path):
    for package in ("array_record", "grain"):
        pytest.importorskip(package, reason=f"{package} is not installed (extra [data])")
    rows = tmp_path / "rows"
    tokenizer = hub.tokenizer(str(world / "gemma"))
    examples = stream_examples(load_folder(world / "corpus"), tokenizer, 10**6, 1)
    about = write_rows(rows, examples, 32, tokenizer=tokenizer_checksum(tokenizer))
    arguments = [*flags, f"--rows={rows}", "--seq_len=32", "--steps=8", "--checkpoint_every=0"]
    for n in (1, 2):
        launcher.run(FINETUNE, [*arguments, f"--name=rows{n}"], n, tmp_path / f"log{n}")
    one, two = (curve(tmp_path / f"rows{n}" / "metrics.jsonl") for n in (1, 2))
    assert [row["tokens"] for row in two] == [row["tokens"] for row in one] and about.rows >= 4
    np.testing.assert_allclose(
        [row["loss"] for row in two], [row["loss"] for row in one], rtol=1e-5
    )

    (rows / "rows.array_record").write_bytes(b"")
    crowd = launcher.start(FINETUNE, [*arguments, "--name=damaged"], 2, tmp_path / "log_damaged")
    assert [outcome.code for outcome in crowd.ended()] == [2, 2]
    assert "rows.array_record is missing or damaged: it holds 0 rows" in crowd.text(
        0
    ) and "Traceback" not in crowd.text(0)
    assert not (tmp_path / "damaged").exists()


def curve(path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_bad_input_is_refused_by_all_and_leaves_nothing(launcher, flags, tmp_path):
    crowd = launcher.start(FINETUNE, [*flags, "--name=bad", "--mesh=data:3"], 2, tmp_path / "log")
    assert [outcome.code for outcome in crowd.ended()] == [2, 2]
    assert "error: mesh data:3 is 3 devices, there are 2" in crowd.text(0)
    assert not (tmp_path / "bad").exists()


def test_a_run_that_is_being_written_refuses_all_processes_of_another_start(
    launcher, flags, tmp_path
):
    run = tmp_path / "taken"
    arguments = [*flags, "--name=taken", "--steps=2000", "--checkpoint_every=0"]
    first = launcher.start(FINETUNE, arguments, 2, tmp_path / "first")
    try:
        first.wait_until(lambda: (run / "metrics.jsonl").exists(), "the first step")
        holder = json.loads((tmp_path / ".taken.lock").read_text())
        for n in (2, 1):
            second = launcher.start(FINETUNE, arguments, n, tmp_path / f"second{n}")
            assert [outcome.code for outcome in second.ended()] == [2] * n
            for process in range(n):
                errors = [
                    line
                    for line in second.text(process).splitlines()
                    if "error" in line or "stops" in line
                ]
                told = f"error: {run} is being written by process {holder['pid']} on {holder['host']}; wait until it is done, or stop it"
                assert errors == [told]
                assert "Traceback" not in second.text(process)
    finally:
        first.kill()
    first.ended()
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))  # of one writer
    launcher.run(FINETUNE, [*flags, "--name=other", "--steps=2"], 1, tmp_path / "other")
