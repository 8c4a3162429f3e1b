"""JobSets for TPU slices: what is in them, that Kubernetes' own schemas take them, and that one
run's processes share a ledger."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kafjax.core.errors import UserError
from kafjax.core.rundir import read_jsonl
from kafjax.parallel.chips import parse_slice
from launch import sweep
from launch.config import Launch
from launch.engines.jobset import hosts_of, manifests
from launch.ledger import Ledger
from launch.spec import Sweep, product
from tests.launch.toy import Toy

ROOT = Path(__file__).parents[2]
KUBERNETES = {
    "image": "registry.example/kafjax:1",
    "volume": "sweeps:/shared",
    "queue": "tpus",
    "retries": 3,
}
FOLDER = Path("/shared/sweeps/My sweep; rm -rf x")
SLICES = ("v5e-1", "v5e-8", "v5e-16", "v5p-8", "v5p-32", "v6e-64", "2*v5e-16", "4*v5p-32")


def toys(folder: Path, **settings: object) -> Ledger:
    return Ledger(folder, Sweep(Toy(**settings), product(rank=[1, 2]), "tests.launch.toy").runs())


def made(topology: str, **settings: object) -> list[dict]:
    config = Launch(**{**KUBERNETES, **settings})
    return list(
        yaml.safe_load_all(
            manifests(FOLDER, toys(FOLDER).runs, config, parse_slice(topology), ["--retries=3"])
        )
    )


@pytest.mark.parametrize(
    ("topology", "slices", "hosts", "chips", "selector"),
    [
        ("v5e-1", 1, 1, 1, ("tpu-v5-lite-podslice", "1x1")),
        ("v5e-8", 1, 1, 8, ("tpu-v5-lite-podslice", "2x4")),
        ("v5e-16", 1, 4, 4, ("tpu-v5-lite-podslice", "4x4")),
        ("v5p-32", 1, 4, 4, ("tpu-v5p-slice", "2x2x4")),
        ("v6e-64", 1, 16, 4, ("tpu-v6e-slice", "8x8")),
        ("2*v5e-16", 2, 4, 4, ("tpu-v5-lite-podslice", "4x4")),
    ],
)
def test_slices_are_booked_whole(topology, slices, hosts, chips, selector):
    assert hosts_of(parse_slice(topology)) == (hosts, chips)
    (job,) = made(topology)[0]["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (job["replicas"], spec["parallelism"], spec["completions"]) == (slices, hosts, hosts)
    pod = spec["template"]["spec"]
    assert tuple(pod["nodeSelector"].values()) == selector
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": str(chips)}


def test_manifest_as_a_whole():
    first, second = made("2*v5e-16")
    runs = toys(FOLDER).runs
    assert [one["metadata"]["name"] for one in (first, second)] == [
        f"my-sweep-rm-rf-x-{run.id}" for run in runs
    ]
    assert first["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "tpus"}
    assert first["spec"]["failurePolicy"]["maxRestarts"] == 3 and first["spec"]["suspend"] is True
    (container,) = first["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "containers"
    ]
    command = [
        "python",
        "-m",
        "launch.sweep",
        "--folder=/shared/sweeps/My sweep; rm -rf x",
        f"--only={runs[0].id}",
        "--retries=3",
    ]
    assert container["command"] == command  # a list: no shell reads it
    assert len(first["metadata"]["name"]) <= 40


@pytest.mark.parametrize("topology", SLICES)
def test_jobs_are_what_kubernetes_takes(topology):
    validate = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is not installed (extra [test])"
    )
    for one in made(topology):
        job = one["spec"]["replicatedJobs"][0]["template"]
        validate.validate(
            {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **job},
            "1.33",
            strict=True,
        )


@pytest.mark.parametrize("topology", SLICES)
def test_jobsets_are_what_their_controller_takes(topology):
    models = pytest.importorskip(
        "kubeflow_trainer_api.models", reason="kubeflow-trainer-api is not installed (extra [test])"
    )
    for one in made(topology):
        read = models.JobsetV1alpha2JobSet.from_dict(one)
        # no field that it does not know
        assert read.to_dict()["spec"]["failurePolicy"] == one["spec"]["failurePolicy"]
        assert read.to_dict()["spec"]["replicatedJobs"] == one["spec"]["replicatedJobs"]


@pytest.mark.parametrize(
    ("topology", "settings", "message"),
    [
        ("h100-8", {}, "--topology=h100-8 is none"),
        ("v5e-4", {"image": None}, "needs --image"),
        ("v5e-4", {"queue": "Tpus!"}, "is no name of a queue"),
        ("v5e-4", {"volume": "sweeps:/elsewhere"}, "lies under /PATH"),
        ("v5e-4", {"volume": "sweeps"}, "write CLAIM:/PATH"),
    ],
)
def test_bad_settings_are_told_in_a_line(topology, settings, message):
    with pytest.raises(UserError, match=message):
        made(topology, **settings)


def test_engine_writes_what_is_left(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    ledger = toys(tmp_path / "toys")
    ledger.create()
    with pytest.raises(UserError, match="needs --topology"):
        sweep.run(Launch(folder=str(ledger.folder), engine="jobset"))
    sweep.run(Launch(folder=str(ledger.folder), only=ledger.runs[0].id))
    settings = {
        **KUBERNETES,
        "volume": f"sweeps:{tmp_path}",
        "topology": "v5e-4",
        "engine": "jobset",
    }
    sweep.run(Launch(folder=str(ledger.folder), **settings))
    assert (
        capsys.readouterr().out.splitlines()[-1]
        == f"Next: kubectl apply -f {ledger.folder}/jobset.yaml"
    )
    (left,) = yaml.safe_load_all((ledger.folder / "jobset.yaml").read_text())
    assert left["metadata"]["name"].endswith(ledger.runs[1].id)


def one_process(ledger: Ledger, number: int) -> subprocess.CompletedProcess:
    place = {
        "JAX_NUM_PROCESSES": "2",
        "JAX_COORDINATOR_ADDRESS": "localhost:1",
        "JOB_COMPLETION_INDEX": str(number),
    }
    command = [
        sys.executable,
        "-m",
        "launch.sweep",
        f"--folder={ledger.folder}",
        f"--only={ledger.runs[0].id}",
        "--retries=9",
    ]
    environ = {**os.environ, **place, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60
    )


@pytest.mark.multiprocess
def test_exit_codes_tell_a_scheduler_what_to_count(tmp_path):
    ledger = toys(tmp_path, fails=1, preempts=1)
    ledger.create()
    codes = [one_process(ledger, 0) for _ in range(3)]
    assert [one.returncode for one in codes] == [
        2,
        143,
        0,
    ] and "failed: error: told to fail at start 1" in codes[0].stderr
    follower = one_process(ledger, 1)
    starts = read_jsonl(ledger.run_folders / ledger.runs[0].id / "starts.jsonl")
    assert follower.returncode == 0 and len(starts) == 3  # done: it starts nothing
    assert ledger.state(ledger.runs[1], 0).name == "pending"


@pytest.mark.multiprocess
def test_later_processes_start_the_run_and_keep_no_ledger(tmp_path):
    ledger = toys(tmp_path)
    ledger.create()
    done = one_process(ledger, 1)
    assert (
        done.returncode == 0
        and "start 1" in done.stdout
        and ledger.state(ledger.runs[0], 0).name == "pending"
    )
