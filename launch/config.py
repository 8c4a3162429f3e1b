"""Settings of `python -m launch.sweep`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from kafjax.core.config import Config, option

ENGINES = ("local", "ray", "slurm", "jobset", "queued")


@dataclasses.dataclass(frozen=True)
class Launch(Config):
    """Settings of a sweep's execution. What is run stands in its spec."""

    spec: str | None = option(
        None,
        "Sweep: a file .py or .yaml, or a name of launch/sweeps. Without it, the one in --folder.",
        path=True,
    )
    folder: str | None = option(
        None,
        "Folder of the sweep, which all its workers share: gs://BUCKET/..., s3:// or a path (default: sweeps/NAME).",
        path=True,
        bucket=True,
    )
    set: tuple[str, ...] = option(
        (),
        "Setting for all runs, NAME=VALUE as on the experiment's command line; may be repeated.",
        repeat=True,
    )
    dry_run: bool = option(
        False, "Tell of each run where it stands and what it will take, and stop. Writes nothing."
    )
    watch: bool = option(
        False,
        "Show a table of the runs while workers are at them, here or elsewhere. Starts and writes nothing.",
    )
    cores: int | None = option(
        None, "Cores of this machine that runs may use (default: all).", least=1
    )
    cores_per_run: int | None = option(
        None,
        "Cores of one run; as many runs go at a time as the budget holds (default: all).",
        least=1,
    )
    devices: tuple[int, ...] = option(
        (),
        "Numbers of the GPUs or TPU chips that runs may use (default: each run sees all).",
        least=0,
    )
    devices_per_run: int = option(1, "Devices of one run, out of --devices.", least=1)
    lanes: int = option(
        8,
        "Most LoRA runs that share one program, if they differ only in what lanes can vary. 1: each alone, equal to the bit.",
        least=1,
        most=1024,
    )
    retries: int = option(
        2, "Attempts after the first failed one. Preemptions are not counted.", least=0
    )
    fail_fast: bool = option(False, "Start nothing more once a run has failed for good.")
    wait: bool = option(
        True,
        "Wait for runs of other workers, in case those die. --nowait frees this machine instead.",
    )
    lease_seconds: float = option(
        60.0,
        "Seconds without a sign of life after which a worker's run is another's.",
        least=1,
        most=86_400,
    )
    launcher: tuple[str, ...] = option(
        (),
        "Words before each run's command, separated by commas: srun,--nodes=2 for runs of many nodes.",
    )
    engine: str = option(
        "local",
        "Who starts the workers: this process, a Ray cluster, or a file that is written for sbatch (slurm), kubectl (jobset) or gcloud (queued).",
        choices=ENGINES,
    )
    workers: int = option(
        4,
        "Workers of --engine=ray and slurm: tasks of the cluster or of the array.",
        least=1,
        most=1000,
    )
    topology: str | None = option(
        None,
        "Accelerators of one run, such as v5e-4 or 2*v5p-32: for the dry run's seconds by formula, and for --engine=jobset, queued and ray.",
    )
    address: str = option("auto", "Ray: address of the cluster.")
    resources: Mapping[str, float] = option(
        {},
        "Ray: resource of each worker beside cores, NAME:NUMBER such as GPU:1 or TPU:4.",
        above=0,
    )
    image: str | None = option(
        None, "Kubernetes and TPU VMs: container image of this checkout (launch/Containerfile)."
    )
    volume: str | None = option(
        None,
        "Kubernetes: CLAIM:/PATH, a persistent volume claim and where it is mounted, here and in pods.",
    )
    queue: str | None = option(None, "Kubernetes: Kueue's local queue.")
    project: str | None = option(None, "TPU VMs: Google Cloud project.")
    zone: str | None = option(None, "TPU VMs: zone, such as us-central2-b.")
    spot: bool = option(False, "TPU VMs: spot capacity, which is cheaper and taken away at times.")
    only: str | None = option(
        None,
        "Id of one run, which this process runs once; or many do together, as a scheduler starts them.",
    )
