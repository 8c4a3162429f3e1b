"""Sweeps whose folder is in a bucket, and their trainings: killed and resumed, they end like those
of a disk."""

from __future__ import annotations

import re
import time
import uuid
from pathlib import Path

import numpy as np
import psutil
import pytest
import safetensors.numpy

from experiments import answer, build_index, compare, finetune, report
from experiments.configs.answer import Answer
from experiments.configs.build_index import BuildIndex
from experiments.configs.compare import Compare
from experiments.configs.finetune import Finetune
from experiments.configs.report import Report
from kafjax.core import paths
from kafjax.core.config import changed
from kafjax.core.errors import UserError
from kafjax.core.paths import as_path
from kafjax.core.rundir import read_json, read_jsonl
from launch import sweep
from launch.config import Launch
from launch.ledger import Ledger, Pulse
from launch.spec import Sweep, product
from tests import tiny
from tests.buckets import names_under
from tests.launch.toy import Toy
from tests.multiprocess.launch import Crowd

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _from_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny.write_gemma(folder / "gemma")
    tiny.write_corpus(folder / "corpus")
    return folder


def toys(folder: str, **axes: object) -> Ledger:
    ledger = Ledger(as_path(folder), Sweep(Toy(), product(**axes), "tests.launch.toy").runs())
    ledger.create()
    return ledger


@pytest.mark.parametrize("place", ["google", "amazon"], indirect=True)
def test_sweep_in_a_bucket_runs_retries_and_remembers(place, capfd):
    ledger = toys(place, fails=[0, 1, 9], rank=[3])
    settings = {"folder": place, "cores_per_run": 1, "lease_seconds": 1.0}
    with pytest.raises(UserError, match="1 of 3 runs failed"):
        sweep.run(Launch(**settings))
    assert [ledger.state(run, 2).name for run in ledger.runs] == ["done", "done", "failed"]
    log = as_path(f"{place}/ledger/{ledger.runs[1].id}/attempt-0001.log")
    assert b"error: told to fail at start 1" in paths.read(log)
    sweep.run(Launch(folder=place, watch=True, retries=2))
    assert "told to fail at start 3" in capfd.readouterr().out
    # another machine's view is the same, and another sweep is refused
    assert len(Ledger.read(as_path(place)).runs) == 3
    with pytest.raises(UserError, match="holds another sweep"):
        toys(place, fails=[7])


def test_lease_in_a_bucket_is_taken_by_one_and_expires(google):
    ledger = toys(f"{google}/{uuid.uuid4().hex}", rank=[1])
    (run,) = ledger.runs
    other = Pulse()
    first = ledger.claim(run, Pulse(), retries=0, lease_seconds=0.3)
    assert ledger.claim(run, other, retries=0, lease_seconds=0.3) is None
    time.sleep(0.2)
    assert first.beat(1) and ledger.claim(run, other, retries=0, lease_seconds=0.3) is None
    time.sleep(0.5)
    second = ledger.claim(run, other, retries=0, lease_seconds=0.3)
    assert second.number == 2 and not first.beat(2)


def settings(world: Path, runs: str, name: str, **more: object) -> Finetune:
    small = {"steps": 6, "batch_rows": 2, "seq_len": 64, "checkpoint_every": 2, "rank": 2}
    folders = {"model": str(world / "gemma"), "corpus": str(world / "corpus"), "runs": runs}
    return changed(Finetune(), **{**small, **folders, "name": name, **more})


def test_training_in_a_bucket_leaves_what_a_disk_holds(world, google, tmp_path, capsys):
    bucket = f"{google}/{uuid.uuid4().hex}"
    for method in ("lora", "full"):
        for runs in (str(tmp_path), bucket):
            finetune.run(settings(world, runs, method, method=method))
    here, there = tmp_path / "lora", as_path(f"{bucket}/lora")
    assert sorted(names_under(f"{bucket}/lora/")) == sorted(file.name for file in here.iterdir())
    assert read_json(there / "config.json") == read_json(here / "config.json")
    for name in ("lora/adapter", "full/weights"):
        with paths.local(as_path(f"{bucket}/{name}.safetensors")) as file:
            ours = safetensors.numpy.load_file(file)
        for key, tensor in safetensors.numpy.load_file(tmp_path / f"{name}.safetensors").items():
            np.testing.assert_array_equal(ours[key], tensor)
    capsys.readouterr()
    asked = {"run": f"{bucket}/lora", "method": "lora", "question": "Where was Mira Toll born?"}
    taken = {leaf: getattr(settings(world, bucket, "x").model, leaf) for leaf in ("model",)}
    answer.run(changed(Answer(), corpus=str(world / "corpus"), **taken, **asked))
    assert "known" in capsys.readouterr().out
    arms = report.run(changed(Report(), folder=(bucket,), out=str(tmp_path / "report")))
    assert len(arms) == 2


@pytest.mark.multiprocess
def test_training_in_a_bucket_is_killed_and_goes_on_to_the_bit(
    world, google, start_sweep, tmp_path
):
    spec = tmp_path / "one.yaml"
    spec.write_text(
        "experiment: finetune\n"
        f"base: {{model: {world}/gemma, corpus: {world}/corpus, steps: 16, batch_rows: 2, "
        "seq_len: 64, checkpoint_every: 2, warmup: 0}\nruns: {product: {rank: [2]}}\n"
    )

    def worker(folder: object) -> Crowd:
        return start_sweep(spec, f"--folder={folder}", "--cores=1", "--lease_seconds=1")

    def whole(crowd: Crowd) -> None:
        (outcome,) = crowd.ended()
        assert outcome.code == 0, outcome

    folder = f"{google}/{uuid.uuid4().hex}"
    whole(worker(tmp_path / "alone"))
    first = worker(folder)
    first.wait_until(
        lambda: any(
            name.endswith("/checkpoints/4/_CHECKPOINT_METADATA")
            for name in names_under(f"{folder}/")
        ),
        "step 4 is saved",
    )
    assert first.runs()
    for victim in psutil.Process(first.pids[0]).children(recursive=True):
        victim.kill()
    first.kill()
    first.ended()
    whole(worker(folder))
    (run,) = Ledger.read(as_path(folder)).runs
    mine, expected = as_path(f"{folder}/runs/{run.id}"), tmp_path / "alone" / "runs" / run.id
    rows = [
        {row["step"]: row["loss"] for row in read_jsonl(one / "metrics.jsonl")}
        for one in (mine, expected)
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 16
    state = Ledger.read(as_path(folder)).state(run, 0)
    assert [attempt.outcome is None for attempt in state.attempts] == [True, False]
    with paths.local(mine / "adapter.safetensors") as file:
        ours = safetensors.numpy.load_file(file)
    for key, tensor in safetensors.numpy.load_file(expected / "adapter.safetensors").items():
        np.testing.assert_array_equal(ours[key], tensor)


COMPARED = {
    "retriever": "lexical",
    "epochs": 1,
    "batch_rows": 2,
    "seq_len": 64,
    "checkpoint_every": 2,
    "rank": 2,
    "k": 2,
    "max_new_tokens": 4,
    "latency_queries": 0,
}


def comparison(world: Path, runs: str, *methods: str) -> Compare:
    folders = {"model": str(world / "gemma"), "corpus": str(world / "corpus"), "runs": runs}
    return changed(Compare(), **{**COMPARED, **folders, "methods": methods, "name": "run"})


def files_of(run: Path) -> set[str]:
    """Lists the files of a run, without locks, whatever its segments are called."""
    names = (
        paths.files_under(run)
        if paths.is_address(run)
        else {file.relative_to(run).as_posix() for file in run.rglob("*") if file.is_file()}
    )
    return {re.sub("segment-[0-9a-f]+", "segment", n) for n in names if not n.endswith(".lock")}


@pytest.mark.slow
def test_comparison_in_a_bucket_says_what_one_on_a_disk_says(
    world, google, amazon, tmp_path, capsys
):
    methods = ("base", "lora", "rag", "lora+rag")
    there = f"{google}/{uuid.uuid4().hex}"
    here = compare.run(comparison(world, str(tmp_path), *methods))["methods"]
    assert compare.run(comparison(world, there, *methods))["methods"].keys() == here.keys()
    mine = as_path(f"{there}/run")
    assert files_of(mine) == files_of(tmp_path / "run")
    found = {**read_json(mine / "results.json")["methods"]}
    assert [found[name]["quality"] for name in methods] == [here[n]["quality"] for n in methods]
    # Amazon's, where checkpoints are staged
    (other,) = compare.run(comparison(world, f"{amazon}/{uuid.uuid4().hex}", "lora"))[
        "methods"
    ].values()
    assert other["quality"]["seen"] == here["lora"]["quality"]["seen"]
    capsys.readouterr()
    compare.run(comparison(world, there, *methods))
    assert capsys.readouterr().err.count("finished earlier") == len(methods)
    asked = {"method": "lora+rag", "question": "Where was Mira Toll born?", "retriever": "lexical"}
    folders = {"model": str(world / "gemma"), "corpus": str(world / "corpus")}
    answer.run(changed(Answer(), **folders, **asked, k=2, run=f"{there}/run"))
    assert "passages  1." in capsys.readouterr().out
    arms = report.run(changed(Report(), folder=(there,), out=str(tmp_path / "report")))
    assert len(arms) == 4 and "Mira Toll" in (tmp_path / "report" / "report.html").read_text()


def test_index_in_a_bucket_is_built_changed_and_asked(world, google, tmp_path, capsys):
    index = f"{google}/{uuid.uuid4().hex}/index"
    words = {"out": index, "retriever": "lexical"}
    build_index.run(changed(BuildIndex(), **words, corpus=str(world / "corpus")))
    (tmp_path / "new.jsonl").write_text('{"id": "new", "contents": "Zora Quell keeps owls."}\n')
    build_index.run(
        changed(BuildIndex(), **words, append=str(tmp_path / "new.jsonl"), query="Who keeps owls?")
    )
    told = capsys.readouterr().out
    assert f"{index}: " in told and "Zora Quell keeps owls." in told
    asked = {"index": index, "retriever": "lexical", "k": 1, "question": "Who keeps owls?"}
    answer.run(changed(Answer(), model=str(world / "gemma"), **asked))
    assert "] Zora Quell keeps owls." in capsys.readouterr().out


def test_what_cannot_lie_in_a_bucket_is_refused_by_name(google, tmp_path):
    spec = tmp_path / "lanes.yaml"
    spec.write_text("experiment: sweep_lora\nruns: {product: {warmup: [0, 1]}}\n")
    with pytest.raises(UserError, match=r"experiments\.sweep_lora does not write to buckets"):
        sweep.run(Launch(spec=str(spec), folder=f"{google}/{uuid.uuid4().hex}"))
