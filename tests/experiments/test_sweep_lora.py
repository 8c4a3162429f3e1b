"""A sweep from the command line: what it writes, that it goes on where it stopped, and what it
refuses."""

from __future__ import annotations

import json
import re
import shlex

import numpy as np
import pytest

from kafjax import hub, lora
from tests.experiments.commands import refused

SETTINGS = (
    "--epochs=12",
    "--batch_rows=2",
    "--seq_len=64",
    "--max_new_tokens=4",
    "--checkpoint_every=10",
)
GRID = ("--ranks=2,4", "--alphas=2r", "--lrs=1e-2", "--seeds=0,1")
NAMES = ["r2-a4-lr0.01-s0", "r2-a4-lr0.01-s1", "r4-a8-lr0.01-s0", "r4-a8-lr0.01-s1"]


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def swept(sweep_lora, world, tmp_path_factory):
    runs = tmp_path_factory.mktemp("sweeps")
    outcome = sweep_lora(*world.flags(runs=runs, embedder=None), *SETTINGS, *GRID, "--name=grid")
    assert outcome.code == 0, outcome.err
    return runs / "grid", outcome


@pytest.mark.multiprocess
def test_writes_lanes_answers_table_and_figures(swept, world):
    run, outcome = swept
    assert "4 lanes at a time: all of them" in outcome.err
    results = json.loads((run / "results.json").read_text())
    base, *cells = results["cells"]
    assert not base["settings"] and set(base["quality"]) == {
        "seen",
        "paraphrase",
        "untrained",
        "retention",
    }
    assert [
        (cell["settings"]["rank"], cell["settings"]["alpha"], cell["seeds"]) for cell in cells
    ] == [(2, 4, [0, 1]), (4, 8, [0, 1])]
    _, params = hub.load(str(world.gemma))
    metrics = rows_of(run / "metrics.jsonl")
    for name in NAMES:
        adapters, spec = lora.load(run / "lanes" / name / "adapter.safetensors", params)
        assert spec.alpha == 2 * spec.rank and all(np.any(pair["b"]) for pair in adapters.values())
        losses = [row["loss"] for row in metrics if row["label"] == name]
        assert results["lanes"][name]["steps"] == len(losses) and losses[-1] < losses[0]
        assert not (run / "lanes" / name / "checkpoints").exists()
    predictions = rows_of(run / "predictions.jsonl")
    assert {row["method"] for row in predictions} == {"base", *NAMES} and len(
        predictions
    ) == 5 * len({row["id"] for row in predictions})
    table = (run / "table.md").read_text()
    assert table in outcome.out and len(re.findall(r"^\| (?:base|\d)", table, re.MULTILINE)) == 3
    assert all(
        (run / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        for name in ("quality", "retention", "loss")
    )
    command = shlex.split(outcome.out.rstrip().splitlines()[-1])
    # with the best cell, and all that the user had set
    assert command[:3] == ["python", "-m", "experiments.compare"]
    assert {
        f"--model={world.gemma}",
        f"--corpus={world.corpus}",
        "--lr_lora=0.01",
        "--seq_len=64",
        f"--runs={run.parent}",
    } <= {*command}
    assert any(word in command for word in ("--rank=2", "--rank=4"))


@pytest.mark.multiprocess
def test_a_larger_grid_trains_only_what_is_new(sweep_lora, world, swept):
    run, before = swept
    kept = {
        name: (run / "lanes" / name / "adapter.safetensors").stat().st_mtime_ns for name in NAMES
    }
    larger = (*GRID[1:], "--ranks=2,4,8", "--lanes=2", "--name=grid")
    outcome = sweep_lora(*world.flags(runs=run.parent, embedder=None), *SETTINGS, *larger)
    assert outcome.code == 0, outcome.err
    assert "4 lanes were trained earlier" in outcome.err
    assert kept == {
        name: (run / "lanes" / name / "adapter.safetensors").stat().st_mtime_ns for name in NAMES
    }
    assert len(json.loads((run / "results.json").read_text())["lanes"]) == 6
    assert before.out != outcome.out


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--ranks="], "--ranks is empty: the grid has no lane"),
        (["--ranks=4,x"], "--ranks: 'x' is no number; write numbers"),
        (["--alphas=qr"], "--alphas: 'qr' is not a number; write 32, or 2r"),
        (["--lrs=0"], "lrs=0.0: must be above 0"),
        (["--ranks=99"], "rank=99 is above min(in, out)"),
        (["--targets=nothing"], "match no kernel"),
        (["--mesh=lane:3"], "there are 1"),
        (["--lanes=0"], "lanes=0: must be 1 or more"),
        (["--ranks=4", "--batch_rows=0"], "batch_rows=0: must be 1 or more"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(sweep_lora, world, tmp_path, arguments, told):
    runs = tmp_path / "runs"
    assert told in refused(
        sweep_lora(*world.flags(runs=runs, embedder=None), *SETTINGS, *arguments)
    )
    assert not runs.exists()


@pytest.mark.multiprocess
def test_a_folder_of_another_sweep_is_refused(sweep_lora, world, swept):
    run, _ = swept
    other = sweep_lora(
        *world.flags(runs=run.parent, embedder=None),
        *SETTINGS,
        *GRID,
        "--name=grid",
        "--replay=0.5",
    )
    assert "holds a run with replay=0.0, not 0.5" in refused(other)


@pytest.mark.multiprocess
def test_a_dry_run_lists_the_lanes_and_writes_nothing(sweep_lora, world, tmp_path):
    outcome = sweep_lora(*world.flags(runs=tmp_path / "runs", embedder=None), *GRID, "--dry_run")
    *lanes, last = outcome.out.splitlines()
    assert outcome.code == 0 and [line.partition(":")[0] for line in lanes] == NAMES
    assert (
        last.startswith(f"{len(NAMES)} lanes. Next: python -m experiments.sweep_lora ")
        and "--dry_run" not in last
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.multiprocess
def test_lanes_leave_early_and_diverged_ones_are_counted(sweep_lora, world, tmp_path):
    grid = (
        "--ranks=4",
        "--lrs=1e-2,1e30",
        "--seeds=0",
        "--early_stop=1",
        "--look_every=2",
        "--name=early",
    )
    outcome = sweep_lora(*world.flags(runs=tmp_path, embedder=None), *SETTINGS, *grid)
    assert outcome.code == 0, outcome.err
    lanes = json.loads((tmp_path / "early" / "results.json").read_text())["lanes"]
    assert (
        lanes["r4-a32-lr1e+30-s0"]["ending"] == "diverged" and lanes["r4-a32-lr0.01-s0"]["checks"]
    )
    assert "1 diverged" in outcome.out
