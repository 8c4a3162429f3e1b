"""JobSets for TPU slices on Google's Kubernetes: one a run, which Kueue admits as its queue has
room.

All hosts of a run's slices start `launch.sweep --only=ID`; process 0 keeps the ledger. Exit code
143 and disruptions fail a Job by its pod failure policy, and the JobSet starts again without
counting; what fails otherwise is counted up to `retries`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from kafjax.core.errors import UserError
from kafjax.core.paths import is_address
from kafjax.parallel.chips import Slice
from launch.config import Launch
from launch.spec import Run

_ACCELERATORS = {  # names of node pools, by the compiler's name of the chip
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}
_GRACE_SECONDS = 300
_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"


def manifests(
    folder: Path, runs: Sequence[Run], config: Launch, topology: Slice, arguments: Sequence[str]
) -> str:
    """Writes the JobSets of `runs` as one YAML file.

    Raises:
      UserError: no TPU, or a setting that is missing or no name in Kubernetes.
    """
    if not topology.is_tpu:
        raise UserError(f"--engine=jobset books slices of TPUs; --topology={topology.name} is none")
    in_bucket = is_address(folder)
    for name in ("image", "queue") if in_bucket else ("image", "volume", "queue"):
        if getattr(config, name) is None:
            raise UserError(f"--engine=jobset needs --{name}")
    if not re.fullmatch(_LABEL, config.queue):
        raise UserError(
            f"--queue='{config.queue[:60]}' is no name of a queue in Kubernetes (small letters, digits and '-')"
        )
    claim, _, mount = (config.volume or "").partition(":")
    if not in_bucket and (
        not re.fullmatch(_LABEL, claim)
        or not mount.startswith("/")
        or not folder.is_relative_to(mount)
    ):
        raise UserError(
            f"--volume='{config.volume[:60]}': write CLAIM:/PATH, where {folder} lies under /PATH here and in the pods"
        )
    shared = None if in_bucket else (claim, mount)
    made = [_jobset(folder, run, config, topology, arguments, shared) for run in runs]
    return yaml.safe_dump_all(made, sort_keys=False)


def command(folder: Path, run: Run, arguments: Sequence[str]) -> list[str]:
    """Lists the words that each host of a run's slices starts."""
    words = ["python", "-m", "launch.sweep", f"--folder={folder}", f"--only={run.id}"]
    return [*words, *arguments]


def submissions(
    folder: Path, runs: Sequence[Run], config: Launch, topology: Slice, arguments: Sequence[str]
) -> str:
    """Writes the same runs as commands of Google's Cluster Toolkit, which makes JobSets itself: for
    one slice a run and a folder in a bucket. Words are quoted."""
    lines = [
        shlex.join(
            [
                *("gcluster", "job", "submit", f"--name={name_of(folder.name)}-{run.id}"),
                *(f"--image={config.image}", f"--queue={config.queue}"),
                f"--compute-type={accelerator(topology)}",
                f"--topology={'x'.join(map(str, topology.shape))}",
                f"--command={shlex.join(command(folder, run, arguments))}",
            ]
        )
        for run in runs
    ]
    return "\n".join(["#!/bin/sh", "set -e", *lines, ""])


def accelerator(topology: Slice) -> str:
    """Returns Google's name of a slice: `v5litepod-16`, `v5p-32`."""
    chips = topology.n_chips // topology.n_slices
    n = chips * (2 if topology.chip.counted == "cores" else 1)
    return f"{'v5litepod' if topology.chip.compiler == 'v5e' else topology.chip.compiler}-{n}"


def hosts_of(topology: Slice) -> tuple[int, int]:
    """Returns the hosts of one slice and the chips of each: up to 8 of v5e and v6e on one host, 4 a
    host in larger slices."""
    chips = topology.n_chips // topology.n_slices
    per_host = chips if chips <= (8 if topology.chip.dims == 2 else 4) else 4
    return chips // per_host, per_host


def _jobset(
    folder: Path,
    run: Run,
    config: Launch,
    topology: Slice,
    arguments: Sequence[str],
    shared: tuple[str, str] | None,
) -> dict[str, Any]:
    hosts, chips = hosts_of(topology)
    labels = {"kueue.x-k8s.io/queue-name": config.queue}
    metadata: dict[str, Any] = {"name": f"{name_of(folder.name)}-{run.id}", "labels": labels}
    if topology.n_slices > 1:
        metadata["annotations"] = {
            "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
        }
    container: dict[str, Any] = {
        "name": "run",
        "image": config.image,
        "command": command(folder, run, arguments),
        "resources": {
            "requests": {"google.com/tpu": str(chips)},
            "limits": {"google.com/tpu": str(chips)},
        },
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": _GRACE_SECONDS,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": _ACCELERATORS[topology.chip.compiler],
            "cloud.google.com/gke-tpu-topology": "x".join(map(str, topology.shape)),
        },
        "containers": [container],
    }
    if shared is not None:  # a bucket needs no volume
        claim, mount = shared
        container["volumeMounts"] = [{"name": "shared", "mountPath": mount}]
        pod["volumes"] = [{"name": "shared", "persistentVolumeClaim": {"claimName": claim}}]
    preempted = [
        {
            "action": "FailJob",
            "onExitCodes": {"containerName": "run", "operator": "In", "values": [143]},
        },
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    job = {
        "completionMode": "Indexed",
        "parallelism": hosts,
        "completions": hosts,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": preempted},
        "template": {"spec": pod},
    }
    again = {
        "name": "preempted",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "suspend": True,  # until Kueue admits it
            "failurePolicy": {"maxRestarts": config.retries, "rules": [again]},
            "replicatedJobs": [
                {"name": "slice", "replicas": topology.n_slices, "template": {"spec": job}}
            ],
        },
    }


def name_of(text: str) -> str:
    """Makes a name that Kubernetes takes and that leaves room for the numbers of Jobs and pods."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:24].strip("-") or "sweep"
