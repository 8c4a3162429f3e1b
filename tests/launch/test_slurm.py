"""A sweep as a SLURM array: the script as text anywhere, and on a real SLURM of this machine's own
where that is installed."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kafjax.core.rundir import read_jsonl
from launch import sweep
from launch.config import Launch
from launch.engines import slurm
from launch.ledger import Ledger
from launch.spec import Sweep, product
from tests.launch.toy import Toy

ROOT = Path(__file__).parents[2]
WANTED = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
MISSING = [
    name for name in WANTED if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
]


def test_nothing_in_the_script_is_read_as_shell(tmp_path):
    folder = tmp_path / "a'; touch evil; $(touch evil) x"
    text = slurm.script(folder, tmp_path, 3, ["--launcher=srun,$(touch evil)"])
    assert "#SBATCH --array=0-2\n" in text and "$(touch evil)" in text
    (tmp_path / "bin").mkdir()
    folder.mkdir()
    script = tmp_path / "sweep.sbatch"
    shown = text.replace(shlex.quote(sys.executable), "printf '%s\\n'").replace(
        f"{sys.executable} ", "printf '%s\\n' "
    )
    script.write_text(shown)
    environ = {**os.environ, "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    subprocess.run(["bash", str(script)], cwd=tmp_path, env=environ, check=True)
    said = (folder / "slurm-7_1.log").read_text().splitlines()
    assert said == [
        "-m",
        "launch.sweep",
        f"--folder={folder}",
        "--nowait",
        "--launcher=srun,$(touch evil)",
    ]
    assert not (tmp_path / "evil").exists()


def test_engine_writes_the_script_beside_the_sweep(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    Ledger(
        tmp_path / "toys", Sweep(Toy(), product(rank=[1, 2]), "tests.launch.toy").runs()
    ).create()
    sweep.run(
        Launch(
            folder=str(tmp_path / "toys"),
            engine="slurm",
            workers=2,
            retries=5,
            launcher=("srun", "--nodes=2"),
        )
    )
    script = tmp_path / "toys" / "sweep.sbatch"
    assert capsys.readouterr().out == f"Next: sbatch {script}\n"
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    assert (
        "--retries=5 --launcher=srun,--nodes=2 &" in script.read_text()
        and f"cd {ROOT}" in script.read_text()
    )


@pytest.mark.slurm
@pytest.mark.multiprocess
@pytest.mark.skipif(
    bool(MISSING),
    reason=f"SLURM is not installed: no {', '.join(MISSING)} (tests/multiprocess/slurm.sh says how)",
)
@pytest.mark.skipif(os.geteuid() != 0, reason="a SLURM cluster of one's own needs root")
def test_array_that_is_preempted_queues_again_and_finishes(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    ledger = Ledger(
        tmp_path / "toys",
        Sweep(Toy(steps=10, seconds=0.5), product(rank=[1, 2, 3]), "tests.launch.toy").runs(),
    )
    ledger.create()
    sweep.run(
        Launch(
            folder=str(ledger.folder),
            engine="slurm",
            workers=2,
            cores=1,
            lease_seconds=5.0,
            launcher=("srun", "--ntasks=1"),
        )
    )
    script = """
        job=$(sbatch --parsable --ntasks=1 --cpus-per-task=1 $TOYS/sweep.sbatch)
        until ls $TOYS/runs/*/metrics.jsonl >/dev/null 2>&1; do sleep 0.2; done
        scancel --signal=TERM --batch ${job}_0
        scancel --signal=TERM --batch ${job}_1
        for _ in $(seq 600); do
          [ $(cat $TOYS/ledger/*/outcome-*.json 2>/dev/null | grep -c '"done"') = 3 ] && break
          # A task that queues again waits two minutes by SLURM's rule; a scheduler in a hurry is told to begin.
          for task in 0 1; do scontrol update JobId=${job}_$task StartTime=now >/dev/null 2>&1; done
          sleep 0.3
        done
        squeue
    """
    environ = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "TOYS": str(ledger.folder),
    }
    command = ["tests/multiprocess/slurm.sh", "bash", "-c", script]
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300
    )
    logs = "".join(file.read_text() for file in ledger.folder.glob("slurm-*.log"))
    states = [ledger.state(run, 0) for run in ledger.runs]
    assert [state.name for state in states] == ["done"] * 3, done.stdout + done.stderr + logs
    assert sum(state.count("preempted") for state in states) >= 1 and not any(
        state.count("failed") for state in states
    ), logs
    for run in ledger.runs:
        assert [
            row["step"] for row in read_jsonl(ledger.run_folders / run.id / "metrics.jsonl")
        ] == list(range(10))
