"""Queued resources of TPU VMs: a script that asks for one slice a run, which starts it and gives
itself back.

    FOLDER here/queued.sh          gcloud commands; run it again to ask anew for what was preempted
    FOLDER here/startup-ID.sh      what each host of the slice of run ID does when it starts

The sweep's folder is in a bucket: TPU VMs share no disk. All hosts of a slice start `launch.sweep
--only=ID` in the container; host 0 keeps the ledger.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from kafjax.core.errors import UserError
from kafjax.core.paths import is_address
from kafjax.parallel.chips import Slice
from launch.config import Launch
from launch.engines.jobset import accelerator, command, name_of
from launch.spec import Run

_RUNTIMES = {  # https://cloud.google.com/tpu/docs/runtimes
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
_PLAIN = r"[a-z0-9][a-z0-9:.-]{0,62}"

_QUEUED = """#!/bin/bash
# Asks for a slice a run. What waits or works is left alone; what was preempted or failed is asked for anew.
set -euo pipefail
cd "$(dirname "$0")"
where=(--project={project} --zone={zone})

ask() {{
  local state
  state=$(gcloud compute tpus queued-resources describe "$1" "${{where[@]}}" --format='value(state.state)' 2>/dev/null || true)
  case "$state" in
    SUSPENDED | FAILED) gcloud compute tpus queued-resources delete "$1" "${{where[@]}}" --force --quiet ;;
    ?*)
      echo "$1: $state"
      return
      ;;
  esac
  gcloud compute tpus queued-resources create "$1" "${{where[@]}}" --node-id="$1" \\
    --accelerator-type={accelerator} --runtime-version={runtime}{spot} \\
    --scopes=https://www.googleapis.com/auth/cloud-platform \\
    --metadata-from-file=startup-script="$2"
}}

{asked}
"""

_STARTUP = """#!/bin/bash
# Runs one run of a sweep on a host of a TPU slice, and gives the slice back once it is done.
set -uo pipefail
about() {{
  curl -fsS -H 'Metadata-Flavor: Google' "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}}
TPU_WORKER_ID=$(about agent-worker-number)
TPU_WORKER_HOSTNAMES=$(about worker-network-endpoints | tr ',' '\\n' | cut -d: -f3 | paste -sd, -)
export TPU_WORKER_ID TPU_WORKER_HOSTNAMES
for _ in $(seq {starts}); do
  docker run --rm --privileged --net=host -e TPU_WORKER_ID -e TPU_WORKER_HOSTNAMES \\
    {image} {command}
  code=$?
  # 2: failed, and tried again; 143: another has it, or the host is being taken away
  [ "$code" = 2 ] || break
done
if [ "$TPU_WORKER_ID" = 0 ] && [ "$code" != 143 ]; then
  gcloud compute tpus queued-resources delete {name} --project={project} --zone={zone} --force --quiet --async
fi
"""


def scripts(
    folder: Path, runs: Sequence[Run], config: Launch, topology: Slice, arguments: Sequence[str]
) -> dict[str, str]:
    """Writes the scripts, by the name of their file. Settings stand in them quoted: no text of
    theirs is read as shell.

    Args:
      folder: of the sweep, in a bucket.
      arguments: of `launch.sweep` beside the folder.

    Raises:
      UserError: no TPU VM, several slices, a folder that is in no bucket, or a setting that is
        missing or no name of Google's.
    """
    kind = topology.chip.compiler
    if kind not in _RUNTIMES:
        known = ", ".join(_RUNTIMES)
        raise UserError(
            f"--engine=queued asks for TPU VMs ({known}); --topology={topology.name} is none"
        )
    if topology.n_slices > 1:
        raise UserError(
            f"--topology={topology.name}: a queued resource is one slice a run here; several slices are for --engine=jobset"
        )
    if not is_address(folder):
        raise UserError(f"TPU VMs do not see {folder}; give a --folder in a bucket, gs://...")
    for name in ("image", "project", "zone"):
        value = getattr(config, name)
        if value is None:
            raise UserError(f"--engine=queued needs --{name}")
        if name != "image" and not re.fullmatch(_PLAIN, value):
            raise UserError(f"--{name}='{value[:60]}' is no name of Google's")
    where = {"project": shlex.quote(config.project or ""), "zone": shlex.quote(config.zone or "")}
    asked, made = [], {}
    for run in runs:
        name, file = f"{name_of(folder.name)}-{run.id}", f"startup-{run.id}.sh"
        made[file] = _STARTUP.format(
            **where,
            starts=config.retries + 1,
            image=shlex.quote(config.image or ""),
            command=shlex.join(command(folder, run, arguments)),
            name=name,
        )
        asked.append(f"ask {name} {file}")
    made["queued.sh"] = _QUEUED.format(
        **where,
        accelerator=shlex.quote(accelerator(topology)),
        runtime=_RUNTIMES[kind],
        spot=" --spot" if config.spot else "",
        asked="\n".join(asked),
    )
    return made
