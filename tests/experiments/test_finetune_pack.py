"""Runs of one program against the same runs alone: folders, checkpoints and results are those of
`finetune`."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from experiments import build, finetune, finetune_pack
from experiments.configs.finetune import Finetune
from kafjax.core.config import changed
from kafjax.core.config_record import record
from kafjax.core.errors import Preempted, UserError
from kafjax.core.rundir import Run, read_json, read_jsonl, write_json
from tests import tiny

RUNS = {
    "a": {"rank": 2},
    "b": {"rank": 5, "alpha": 3.0, "lr": 3e-3, "seed": 1},
    "c": {"rank": 3, "targets": "q_proj", "lr": 5e-3, "seed": 2},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Finetune:
    world = tmp_path_factory.mktemp("world")
    tiny.write_gemma(world / "gemma")
    tiny.write_corpus(world / "corpus")
    return changed(
        Finetune(),
        model=str(world / "gemma"),
        corpus=str(world / "corpus"),
        steps=6,
        batch_rows=2,
        seq_len=64,
        checkpoint_every=100,
    )


def alone(base: Finetune, runs: Path, name: str) -> None:
    finetune.run(changed(base, runs=str(runs), name=name, **RUNS[name]))


def together(base: Finetune, runs: Path, names: str, **changes: dict) -> None:
    named = []
    for name in names:
        file = runs.parent / f"{runs.name}-{name}.json"
        write_json(file, record(changed(base, **{**RUNS[name], **changes.get(name, {})})))
        named.append(f"{name}={file}")
    finetune_pack.run(finetune_pack.Pack(run=tuple(named), runs=str(runs)))


@pytest.fixture(scope="module")
def expected(base, tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("alone")
    for name in RUNS:
        alone(base, runs, name)
    return runs


def preempt_at(monkeypatch, step: int) -> None:
    """Sends SIGTERM while the rows of a step are logged."""
    log = Run.log

    def logged(self: Run, **row) -> None:
        log(self, **row)
        if row["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "log", logged)


def assert_same(run: Path, expected: Path) -> None:
    assert sorted(file.name for file in run.iterdir()) == sorted(
        file.name for file in expected.iterdir()
    )
    assert read_json(run / "config.json") == read_json(expected / "config.json")
    ours, theirs = (
        {row["step"]: row["loss"] for row in read_jsonl(folder / "metrics.jsonl")}
        for folder in (run, expected)
    )
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose([*ours.values()], [*theirs.values()], rtol=1e-5)
    adapters = safetensors.numpy.load_file(run / "adapter.safetensors")
    for name, tensor in safetensors.numpy.load_file(expected / "adapter.safetensors").items():
        np.testing.assert_allclose(adapters[name], tensor, atol=1e-5)
    took, expected_took = (read_json(folder / "result.json") for folder in (run, expected))
    assert took.keys() == expected_took.keys()
    for name in ("steps", "tokens", "targets", "trainable_parameters", "optimizer_bytes"):
        assert took[name] == expected_took[name], name
    for name in ("final_loss", "flops_useful"):
        assert took[name] == pytest.approx(expected_took[name], rel=1e-5), name
    for name in ("weights", "packages"):
        assert took["environment"][name] == expected_took["environment"][name]


def test_packed_run_leaves_the_folder_of_its_solo_run(base, expected, tmp_path, capfd):
    together(base, tmp_path / "runs", "abc")
    for name in RUNS:
        assert_same(tmp_path / "runs" / name, expected / name)
        assert read_json(tmp_path / "runs" / name / "result.json")["lanes"] == 3
    told = capfd.readouterr().err
    assert "3 runs in one program" in told and "compiled once" in told
    together(base, tmp_path / "runs", "abc")  # all are done
    assert "finished earlier" in capfd.readouterr().err
    # a name that is taken keeps its identity
    with pytest.raises(UserError, match="holds a run with rank=2, not 4"):
        together(base, tmp_path / "runs", "ab", a={"rank": 4})


def test_solo_run_resumes_a_lane_and_a_lane_a_solo_run(base, expected, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        preempt_at(patch, 3)
        with pytest.raises(Preempted, match="saved a at step 3, b at step 3"):
            together(base, tmp_path / "lanes", "ab")
        with pytest.raises(Preempted):
            alone(base, tmp_path / "solo", "a")
    alone(base, tmp_path / "lanes", "a")
    together(base, tmp_path / "solo", "ab")
    for runs in ("lanes", "solo"):
        assert_same(tmp_path / runs / "a", expected / "a")
    assert_same(tmp_path / "solo" / "b", expected / "b")


def test_run_that_diverges_fails_and_the_others_go_on(base, expected, tmp_path, capfd):
    with pytest.raises(UserError, match="1 of 2 runs diverged: b"):
        together(base, tmp_path / "runs", "ab", b={"lr": 1e30})
    told = capfd.readouterr().err
    assert "b: error: lora: the loss is nan at step" in told and "lower the learning rate" in told
    assert not (tmp_path / "runs" / "b" / "result.json").exists()
    assert read_json(tmp_path / "runs" / "a" / "result.json")["final_loss"] is not None


def test_only_what_lanes_can_vary_is_shared(base):
    model = build.describe_decoder(base.model)

    def key(**settings: object) -> str | None:
        return finetune_pack.shared_by(changed(base, **settings), model)

    free = {"rank": 8, "alpha": 1.0, "lr": 1.0, "seed": 7, "targets": "q_proj", "rslora": True}
    assert len({key(), *(key(**{name: value}) for name, value in free.items())}) == 1
    bound = {"steps": 7, "batch_rows": 4, "weight_decay": 0.5, "dtype": "bfloat16", "replay": 0.5}
    assert len({key(), *(key(**{name: value}) for name, value in bound.items())}) == 6
    generated = [key(corpus="biographies", seed=seed) for seed in (0, 1)]
    assert generated[0] != generated[1]  # each seed has texts of its own
    alone = {"method": "full", "dora": True, "dropout": 0.1, "optimizer": "adafactor"}
    alone |= {"budget": "1m", "init": "pissa", "targets": "embedding"}
    assert [name for name, value in alone.items() if key(**{name: value}) is not None] == []


def test_runs_of_two_programs_are_refused(base, tmp_path):
    with pytest.raises(UserError, match="do not share a program"):
        together(base, tmp_path / "runs", "ab", a={"steps": 3})
    assert not (tmp_path / "runs").exists()
    for words, message in (((), "give the runs"), (("a",), "write NAME=CONFIG")):
        with pytest.raises(UserError, match=message):
            finetune_pack.run(dataclasses.replace(finetune_pack.Pack(), run=words))
