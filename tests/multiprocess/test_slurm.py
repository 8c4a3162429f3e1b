"""A training of two tasks under a real SLURM on this machine: it finds its place, and a cancelled
one goes on where it was."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests import tiny
from tests.multiprocess.launch import FINETUNE, ROOT, WORKER

WANTED = ("munged", "slurmctld", "slurmd", "srun", "scancel")
MISSING = [
    name for name in WANTED if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
]
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.multiprocess,
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"SLURM is not installed: no {', '.join(MISSING)} (tests/multiprocess/slurm.sh says how)",
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="a SLURM cluster of one's own needs root"),
]
SRUN = f"srun --nodes=2 --ntasks=2 --kill-on-bad-exit=0 {sys.executable} -W ignore -m"


def under_slurm(script: str, **environ: object) -> subprocess.CompletedProcess:
    command = ["tests/multiprocess/slurm.sh", "bash", "-c", f"set -u; {script}"]
    environ = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"} | {
        k: str(v) for k, v in environ.items()
    }
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_tasks_of_two_nodes_find_each_other(tmp_path):
    done = under_slurm(f"{SRUN} {WORKER} --do=meet,{tmp_path}")
    assert done.returncode == 0, done.stderr
    assert {"0 of 2: [0, 1], main True", "1 of 2: [0, 1], main False"} <= set(
        done.stdout.splitlines()
    )


def test_cancelled_training_goes_on_with_the_exact_next_batch(tmp_path):
    tiny.write_gemma(tmp_path / "gemma")
    tiny.write_corpus(tmp_path / "corpus")
    flags = f"--model={tmp_path / 'gemma'} --corpus={tmp_path / 'corpus'} --runs={tmp_path} --name=run --rank=4 --warmup=0 --batch_rows=2"
    train = f"{SRUN} {FINETUNE} {flags} --seq_len=64 --checkpoint_every=1000 --steps=120"
    script = """
        $TRAIN & step=$!
        until [ -s $RUN/metrics.jsonl ]; do kill -0 $step || exit 1; sleep 0.1; done
        scancel --signal=TERM 1.0
        wait $step; echo "first: $?"
        $TRAIN; echo "second: $?"
    """
    done = under_slurm(script, TRAIN=train, RUN=tmp_path / "run")
    assert "first: 143" in done.stdout and "second: 0" in done.stdout, done.stdout + done.stderr
    saved = int(done.stderr.split("saved step ")[1].split()[0])
    assert 1 <= saved < 120 and f"resuming after step {saved} of 120" in done.stderr
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows] == list(range(1, 121))  # every step once, by one writer
    assert np.isfinite([row["loss"] for row in rows]).all() and rows[-1]["loss"] < rows[0]["loss"]
