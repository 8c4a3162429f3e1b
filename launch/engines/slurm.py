"""A SLURM array of workers that share a sweep's folder. Who submits chooses the resources: `sbatch
--gpus=1 --time=4:00:00 FILE`."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

_SCRIPT = """#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --array=0-{last}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=/dev/null
#SBATCH --signal=B:TERM@{notice}
# SIGTERM comes {notice} s before the time limit, and at preemption. The worker saves and exits with 143; then this task queues again.
set -u
exec >> {folder}/slurm-"$SLURM_ARRAY_JOB_ID"_"$SLURM_ARRAY_TASK_ID".log 2>&1
cd {directory}
{command} &
worker=$!
asked=
trap 'asked=yes; kill -TERM "$worker" 2>/dev/null' TERM
wait "$worker"
code=$?
if [ -n "$asked" ]; then  # the trap ends a wait, not the worker
  wait "$worker"
  code=$?
fi
if [ "$code" = 143 ]; then
  scontrol requeue "$SLURM_ARRAY_JOB_ID"_"$SLURM_ARRAY_TASK_ID"
fi
exit "$code"
"""


def script(
    folder: Path, directory: Path, workers: int, arguments: Sequence[str], notice_seconds: int = 300
) -> str:
    """Writes the batch script. Folders and arguments stand in it quoted: no text of theirs is read
    as shell.

    Args:
      folder: of the sweep, on a file system that all nodes share.
      directory: the checkout that workers run from.
      workers: tasks of the array.
      arguments: of `launch.sweep` beside the folder.
    """
    command = [sys.executable, "-m", "launch.sweep", f"--folder={folder}", "--nowait", *arguments]
    return _SCRIPT.format(
        name=re.sub(r"[^A-Za-z0-9_-]+", "-", folder.name) or "sweep",
        last=workers - 1,
        notice=notice_seconds,
        folder=shlex.quote(str(folder)),
        directory=shlex.quote(str(directory)),
        command=shlex.join(command),
    )
