"""Two and four real processes give what one gives, find each other or say so, and tell who holds
them up."""

from __future__ import annotations

import json
import shutil
import signal
import time

import numpy as np
import pytest

from kafjax.parallel import place
from tests.multiprocess import launch
from tests.multiprocess.launch import STALLED_STEPS, WORKER

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def alone(launcher, tmp_path_factory):
    """One process with one device."""
    folder = tmp_path_factory.mktemp("alone")
    launcher.run(WORKER, [f"--do=learn,{folder},auto,full,lora"], 1, folder / "log")
    return folder


def close(ours, theirs, name: str) -> None:
    curves = [json.loads((folder / f"{name}.json").read_text()) for folder in (ours, theirs)]
    assert len(curves[0]) == len(curves[1]) > 1
    for row, expected in zip(*curves, strict=True):
        assert row["tokens"] == expected["tokens"] and row["targets"] == expected["targets"]
        np.testing.assert_allclose(row["loss"], expected["loss"], rtol=1e-5)
        np.testing.assert_allclose(row["grad_norm"], expected["grad_norm"], rtol=1e-4)
    ours, theirs = (np.load(folder / f"{name}.npz") for folder in (ours, theirs))
    assert set(ours.files) == set(theirs.files)
    for path in ours.files:
        np.testing.assert_allclose(ours[path], theirs[path], atol=2e-5, err_msg=path)


@pytest.mark.parametrize(
    ("n", "devices", "mesh", "kinds"),
    [
        # LoRA there: compiled as for a user, below
        (2, 1, "fsdp:2", ("full",)),
        (2, 2, "data:2/tensor:2", ("full", "lora")),
        # LoRA in four processes: where a checkpoint goes to others, below
        (4, 1, "data:2/fsdp:2", ("full",)),
    ],
    ids=["2-1-fsdp:2", "2-2-data:2/tensor:2", "4-1-data:2/fsdp:2"],
)
def test_many_processes_train_as_one_does(launcher, alone, tmp_path, n, devices, mesh, kinds):
    arguments = [f"--do=learn,{tmp_path},{mesh},{','.join(kinds)}"]
    outcomes = launcher.run(WORKER, arguments, n, tmp_path / "log", devices)
    for kind in kinds:
        close(tmp_path, alone, kind)
    assert "full: compiling" in outcomes[0].err
    for other in outcomes[1:]:  # progress is told once
        assert "compiling" not in other.err and "6/6" not in other.err


def test_processes_that_compile_as_for_a_user_train_as_one_does(alone, tmp_path):
    with launch.Launcher(optimised=True) as launcher:
        launcher.run(WORKER, [f"--do=learn,{tmp_path},fsdp:2,lora"], 2, tmp_path / "log", 1)
    close(tmp_path, alone, "lora")


@pytest.mark.parametrize("scheduler", ["SLURM", "Kubernetes", "TPU pod"])
def test_processes_find_each_other_by_what_the_scheduler_says(launcher, tmp_path, scheduler):
    if scheduler == "SLURM":
        environ = launch.slurm(launch.free_port(place.FIRST_PORT) - place.FIRST_PORT)
    else:
        environ = (
            launch.tpu_pod if scheduler == "TPU pod" else launch.kubernetes(launch.free_port())
        )
    outcomes = launcher.run(WORKER, [f"--do=meet,{tmp_path}"], 2, tmp_path / "log", environ=environ)
    assert (
        "0 of 2: [0, 1], main True\n" in outcomes[0].out
        and "1 of 2: [0, 1], main False\n" in outcomes[1].out
    )


@pytest.fixture(scope="module")
def broken_off(launcher, tmp_path_factory):
    """Trainings of two processes, by kind, that stopped with checkpoints of steps 2 and 3 on the
    disk."""
    folder = tmp_path_factory.mktemp("broken_off")
    for kind in ("full", "lora"):
        outcomes = launcher.start(
            WORKER, [f"--do=resume,{folder / kind},fsdp:2,{kind},4"], 2, folder / kind / "log"
        ).ended()
        assert outcomes[0].code == 2 and "error: far enough" in outcomes[0].err
        assert outcomes[1].code != 0
    return folder


@pytest.mark.parametrize(
    ("kind", "n", "devices", "mesh"),
    [("full", 2, 2, "data:2/fsdp:2"), ("full", 1, 2, "data:2"), ("lora", 4, 1, "fsdp:2/tensor:2")],
)
def test_checkpoint_goes_to_other_processes_and_another_mesh(
    launcher, alone, broken_off, tmp_path, kind, n, devices, mesh
):
    folder = shutil.copytree(broken_off / kind, tmp_path / "run")
    (outcome, *_) = launcher.run(
        WORKER, [f"--do=resume,{folder},{mesh},{kind},99"], n, tmp_path / "log", devices
    )
    assert "resuming after step" in outcome.err
    close(folder, alone, kind)


def test_checkpoint_of_another_training_is_refused_by_all(launcher, broken_off, tmp_path):
    folder = shutil.copytree(broken_off / "full", tmp_path / "run")

    def finished():
        return sorted(
            path.name for path in (folder / "checkpoints").iterdir() if path.name.isdigit()
        )

    there = finished()
    outcomes = launcher.start(
        WORKER, [f"--do=resume,{folder},fsdp:2,lora,99"], 2, tmp_path / "log"
    ).ended()
    assert [outcome.code for outcome in outcomes] == [2, 2], outcomes
    assert (
        f"error: {folder / 'checkpoints'} holds checkpoints of a training with another model, settings or data"
        in outcomes[0].err
    )
    assert finished() == there and there  # what a broken save left may be cleared away


def test_part_that_one_process_cannot_read_is_passed_over_by_all(
    launcher, alone, broken_off, tmp_path
):
    folder = shutil.copytree(broken_off / "full", tmp_path / "run")
    newest = max(
        (path for path in (folder / "checkpoints").iterdir() if path.name.isdecimal()),
        key=lambda path: int(path.name),
    )
    parts = [path for path in (newest / "state").glob("ocdbt.process_1/d/*") if path.is_file()]
    max(parts, key=lambda path: path.stat().st_size).unlink()
    outcomes = launcher.run(WORKER, [f"--do=resume,{folder},fsdp:2,full,99"], 2, tmp_path / "log")
    told = [line for outcome in outcomes for line in outcome.err.splitlines() if "damaged" in line]
    assert told and f"the checkpoint of step {newest.name} is damaged" in told[0]
    assert f"resuming after step {int(newest.name) - 1} of" in outcomes[0].err
    close(folder, alone, "full")
    assert list((folder / "checkpoints-damaged").iterdir())


@pytest.mark.parametrize("frozen", [0, 1])
def test_watchdog_names_the_process_that_holds_up_the_others(launcher, tmp_path, frozen):
    crowd = launcher.start(WORKER, [f"--do=stall,{tmp_path},fsdp:2"], 2, tmp_path / "log")
    step = tmp_path / "step"
    crowd.wait_until(lambda: step.exists() and step.read_text() > "1", "training runs")
    crowd.signal(frozen, signal.SIGSTOP)
    crowd.wait_until(
        lambda: "has not reached step" in crowd.text(1 - frozen), "the other one tells of it"
    )
    crowd.signal(frozen, signal.SIGCONT)
    outcomes = crowd.ended()
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    told = [
        line for line in outcomes[1 - frozen].err.splitlines() if "has not reached step" in line
    ]
    assert told and all(
        line.startswith(f"process {frozen} has not reached step ") for line in told
    ), told
    # and went on when it did
    assert len(json.loads((tmp_path / "stalled.json").read_text())) == STALLED_STEPS
    assert not (tmp_path / "heartbeats").exists()


def test_error_of_one_process_ends_it_at_once(launcher, tmp_path):
    began = time.monotonic()
    outcomes = launcher.start(WORKER, [f"--do=fail,{tmp_path}"], 2, tmp_path / "log").ended()
    assert outcomes[1].code == 2 and "error: the disk of this host is full" in outcomes[1].err
    assert outcomes[0].code != 0 and "process 0 of 2 stops" in outcomes[0].err
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("only", "awaited"), [(0, "the other 1 processes"), (1, "the coordinator at 127.0.0.1:")]
)
def test_one_that_waits_in_vain_says_so_in_a_line(launcher, tmp_path, only, awaited):
    crowd = launcher.start(WORKER, [f"--do=alone,{tmp_path}"], 2, tmp_path / "log")
    crowd.signal(1 - only, signal.SIGKILL)
    outcome = crowd.ended()[only]
    assert outcome.code == 2
    assert f"error: process {only} of 2 (from flags) waited 5 s for {awaited}" in outcome.err
    assert "stack trace" not in outcome.err
