"""A sweep on a real Ray cluster of several raylets on this machine: a node is killed in mid-run,
and its run goes on elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from kafjax.core.errors import UserError
from kafjax.core.rundir import read_jsonl
from launch import sweep
from launch.config import Launch
from launch.ledger import Ledger
from launch.spec import Sweep, product
from tests.launch.toy import Toy

ROOT = Path(__file__).parents[2]


def toys(folder: Path, **settings: object) -> Ledger:
    ledger = Ledger(
        folder, Sweep(Toy(**settings), product(rank=[1, 2, 3]), "tests.launch.toy").runs()
    )
    ledger.create()
    return ledger


def start_until_it_trains(
    ledger: Ledger, address: str, *settings: str
) -> tuple[subprocess.Popen, psutil.Process]:
    """Starts the sweep on the cluster. Returns its process once the first run has done three
    steps, and the raylet that the run is on."""
    command = [sys.executable, "-m", "launch.sweep", f"--folder={ledger.folder}", "--engine=ray"]
    command += [f"--address={address}", "--cores=1", "--lease_seconds=3", "--retries=0", *settings]
    environ = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    driver = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    until, metrics = time.monotonic() + 120, metrics_of(ledger)
    while not (metrics.exists() and len(read_jsonl(metrics, skip_broken_tail=True)) > 2):
        assert time.monotonic() < until and driver.poll() is None, (
            driver.stdout.read() if driver.poll() is not None else ""
        )
        time.sleep(0.1)
    worker = psutil.Process(ledger.state(ledger.runs[0], 0).attempts[0].pid)
    return driver, next(one for one in worker.parents() if one.name() == "raylet")


def kill(raylet: psutil.Process) -> None:
    """Kills a node and its processes at once, as a machine dies."""
    for one in [*raylet.children(recursive=True), raylet]:
        one.kill()


def metrics_of(ledger: Ledger) -> Path:
    return ledger.run_folders / ledger.runs[0].id / "metrics.jsonl"


def test_without_ray_a_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    toys(tmp_path)
    with pytest.raises(UserError, match="--engine=ray needs Ray: pip install"):
        sweep.run(Launch(folder=str(tmp_path), engine="ray"))


@pytest.mark.ray
@pytest.mark.multiprocess
def test_run_of_a_killed_node_goes_on_on_another(tmp_path):
    from ray.cluster_utils import Cluster

    ledger = toys(tmp_path / "toys", steps=16, seconds=0.5)
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, resources={"TPU": 4})
        settings = ("--workers=2", "--resources=TPU:4")
        driver, raylet = start_until_it_trains(ledger, cluster.address, *settings)
        kill(raylet)
        out = driver.communicate(timeout=150)[0]
        assert driver.returncode == 0, out
    finally:
        cluster.shutdown()
    states = [ledger.state(run, 0) for run in ledger.runs]
    assert [state.name for state in states] == ["done"] * 3 and len(states[0].attempts) == 2
    steps = [row["step"] for row in read_jsonl(metrics_of(ledger))]
    assert steps == list(range(16))  # it went on where it was


@pytest.mark.ray
@pytest.mark.multiprocess
def test_run_of_a_slice_goes_on_on_another_when_a_host_is_killed(tmp_path):
    from ray.cluster_utils import Cluster

    ledger = toys(tmp_path / "toys", steps=16, seconds=0.5)
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    hosts = {}
    try:
        for number in range(2):
            for host in range(2):
                head = {"TPU-v5p-16-head": 1} if host == 0 else {}
                labels = {
                    "ray.io/tpu-slice-name": f"slice-{number}",
                    "ray.io/tpu-worker-id": str(host),
                    "ray.io/tpu-pod-type": "v5p-16",
                    "ray.io/tpu-topology": "2x2x2",
                    "ray.io/accelerator-type": "TPU-V5P",
                }
                hosts[number, host] = cluster.add_node(
                    num_cpus=1,
                    resources={"TPU": 4, **head},
                    labels=labels,
                    env_vars={"TPU_NAME": f"slice-{number}", "TPU_WORKER_ID": str(host)},
                )
        settings = ("--topology=v5p-16", "--workers=1")
        driver, raylet = start_until_it_trains(ledger, cluster.address, *settings)
        assert len({*_processes(ledger, 0), *_processes(ledger, 1)}) == 2  # one a host
        kill(raylet)
        out = driver.communicate(timeout=200)[0]
        assert driver.returncode == 0 and "a host of its slice is lost" in out, out
    finally:
        cluster.shutdown()
    states = [ledger.state(run, 0) for run in ledger.runs]
    assert [state.name for state in states] == ["done"] * 3 and len(states[0].attempts) == 2
    assert [row["step"] for row in read_jsonl(metrics_of(ledger))] == list(range(16))


def _processes(ledger: Ledger, number: int) -> list[int]:
    """Process ids of the toy that has this number among those of its run."""
    found = []
    for one in psutil.process_iter(["cmdline", "environ"]):
        words, environ = one.info["cmdline"] or [], one.info["environ"] or {}
        if "tests.launch.toy" in words and f"--runs={ledger.run_folders}" in words:
            found += [one.pid] * (environ.get("JAX_PROCESS_ID") == str(number))
    return found
