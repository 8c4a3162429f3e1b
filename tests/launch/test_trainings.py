"""A sweep of real trainings on a tiny model: killed at random and finished by racing workers, it
ends like one left alone."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import safetensors.numpy

from kafjax.core.errors import UserError
from kafjax.core.rundir import read_json, read_jsonl
from launch import sweep
from launch.config import Launch
from launch.ledger import Ledger
from launch.load import open_spec
from tests import tiny
from tests.multiprocess.launch import Crowd

KILLS = 2
SPEC = """
experiment: finetune
base: {{model: {world}/gemma, corpus: {world}/corpus, steps: 8, batch_rows: 2, seq_len: 64, checkpoint_every: 1, warmup: 0}}
runs:
  product: {{rank: [2, 4], seed: {{range: 2}}}}
"""


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> Path:
    world = tmp_path_factory.mktemp("world")
    tiny.write_gemma(world / "gemma")
    tiny.write_corpus(world / "corpus")
    file = world / "ranks.yaml"
    file.write_text(SPEC.format(world=world))
    return file


def test_dry_run_estimates_trainings(spec, tmp_path, capsys):
    sweep.run(Launch(spec=str(spec), folder=str(tmp_path / "none"), dry_run=True, topology="v5e-4"))
    out = capsys.readouterr().out
    assert (
        f"on {4 * 8 * 2 * 64:,} tokens, by formula" in out
        and "formula, v5e-4" in out
        and "accelerator-hours" in out
    )
    # the texts lie in a folder, so that seeds share them
    assert (
        "Program 1: 4 runs, 1 start of up to 8 lanes." in out
        and "Sharing saves 3 compilations" in out
    )
    sweep.run(Launch(spec=str(spec), folder=str(tmp_path / "none"), set=("steps=9",), dry_run=True))
    assert "known once one is done" in capsys.readouterr().out


def test_dry_run_names_the_run_that_would_be_refused(spec, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(spec.read_text().replace("[2, 4]", "[2, 400]"))
    with pytest.raises(UserError, match=r"^run [0-9a-f]{12} {'rank': 400, 'seed': 0}: .*rank=400"):
        sweep.run(Launch(spec=str(mine), folder=str(tmp_path / "none"), dry_run=True))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_packed_killed_and_raced_sweep_equals_one_left_alone_run_by_run(
    spec, start_sweep, tmp_path
):
    (tmp_path / "two.yaml").write_text(spec.read_text().replace("range: 2", "range: 1"))
    spec = tmp_path / "two.yaml"

    def worker(folder: str, lanes: int) -> Crowd:
        settings = ("--cores=1", "--lease_seconds=2", f"--lanes={lanes}")
        return start_sweep(spec, f"--folder={tmp_path / folder}", *settings)

    (alone,) = worker("alone", lanes=1).ended()
    assert alone.code == 0, alone
    rng, killed = random.Random(0), 0
    for number in range(KILLS):
        one = worker("killed", lanes=8)
        time.sleep(rng.uniform(2.0, 7.0))
        if one.runs():
            killed += 1
            # a dead machine, or a preempted one
            children = psutil.Process(one.pids[0]).children(recursive=True) if number % 2 else []
            one.signal(0, signal.SIGKILL if number % 2 else signal.SIGTERM)
            for child in children:
                child.kill()
        one.ended()
    racing = [worker("killed", lanes=8) for _ in range(3)]
    for (outcome,) in [one.ended() for one in racing]:
        assert outcome.code == 0, outcome
    assert killed
    whole, other = (
        Ledger(tmp_path / name, open_spec(str(spec)).runs()) for name in ("alone", "killed")
    )
    for run in whole.runs:
        assert other.state(run, 0).name == "done" and other.state(run, 0).count("failed") == 0
        mine, expected = (ledger.run_folders / run.id for ledger in (other, whole))
        for name, tensor in safetensors.numpy.load_file(expected / "adapter.safetensors").items():
            ours = safetensors.numpy.load_file(mine / "adapter.safetensors")[name]
            np.testing.assert_allclose(ours, tensor, atol=1e-5)
        ends = [read_json(folder / "result.json")["final_loss"] for folder in (mine, expected)]
        assert ends[0] == pytest.approx(ends[1], rel=1e-5)
        losses = [
            {row["step"]: row["loss"] for row in read_jsonl(folder / "metrics.jsonl")}
            for folder in (mine, expected)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 8
