"""A process's place among many: their number and ranks come from SLURM, Kubernetes, a TPU pod, or
are given explicitly."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from kafjax.core.errors import UserError

FIRST_PORT, _N_PORTS = 61_440, 4_096  # ports that a SLURM job's number is mapped to
_TPU_PORT = 8482  # the one that JAX takes


@dataclasses.dataclass(frozen=True)
class Place:
    """A process's place among the others.

    Attributes:
      coordinator: `host:port` of process 0, which all others register with.
      local_devices: indices of the host's accelerators that this process takes; None for all.
      source: the scheduler or setting that it was read from.
    """

    coordinator: str
    num_processes: int
    process_id: int
    local_devices: tuple[int, ...] | None = None
    source: str = "flags"

    def __post_init__(self) -> None:
        told = (
            f"process_id={self.process_id}, num_processes={self.num_processes} (from {self.source})"
        )
        if not 0 <= self.process_id < self.num_processes:
            raise UserError(f"{told}: processes are numbered from 0 to num_processes - 1")
        if not re.fullmatch(r"\S+:\d+", self.coordinator):
            raise UserError(
                f"coordinator='{self.coordinator}' (from {self.source}) is not of the form host:port, say 10.0.0.1:1234"
            )


def find_place(
    environ: Mapping[str, str],
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Place | None:
    """Finds this process's place. None if it is alone, or on a TPU host that only the metadata
    server knows.

    Explicit values, given as arguments or as `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID`, come first. Then:
      SLURM: a step of several tasks (`srun`). Process 0's host listens on a port that follows from
        the job's and step's number. Where a host runs several tasks, each takes one accelerator of
        those that it sees.
      Kubernetes: an Indexed Job or a JobSet, whose pods know their `JOB_COMPLETION_INDEX`; how many
        they are and where process 0 is has to stand in the manifest, as `JAX_NUM_PROCESSES` and
        `JAX_COORDINATOR_ADDRESS`.
      TPU pods: a process a host of one or several slices, as Google's Kubernetes says
        (`TPU_WORKER_HOSTNAMES`, `TPU_WORKER_ID`, `MEGASCALE_*`); not where `JAX_PLATFORMS` leaves
        the TPUs alone.

    Raises:
      UserError: something is missing or not a number.
    """
    coordinator = coordinator or environ.get("JAX_COORDINATOR_ADDRESS")
    num_processes = (
        _number(environ, "JAX_NUM_PROCESSES") if num_processes is None else num_processes
    )
    process_id = _number(environ, "JAX_PROCESS_ID") if process_id is None else process_id
    slurm = "SLURM_STEP_NODELIST" in environ and "SLURM_PROCID" in environ
    source, local = "flags", None
    if slurm and num_processes is None:
        source = "SLURM"
        num_processes = _number(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
        process_id = _number(environ, "SLURM_PROCID") if process_id is None else process_id
        coordinator = (
            coordinator or f"{first_host(environ['SLURM_STEP_NODELIST'])}:{_slurm_port(environ)}"
        )
        local = _slurm_devices(environ)
    elif process_id is None and "JOB_COMPLETION_INDEX" in environ and num_processes is not None:
        source, process_id = "Kubernetes", _number(environ, "JOB_COMPLETION_INDEX")
    elif num_processes is None and process_id is None:
        return _tpu_place(environ)
    if (num_processes is None and process_id is None) or num_processes == 1:
        return None
    if coordinator is None or num_processes is None or process_id is None:
        values = {
            "coordinator": coordinator,
            "num_processes": num_processes,
            "process_id": process_id,
        }
        given = ", ".join(f"{name}={value}" for name, value in values.items() if value is not None)
        name = next(name for name, value in values.items() if value is None)
        variable = "JAX_COORDINATOR_ADDRESS" if name == "coordinator" else f"JAX_{name.upper()}"
        raise UserError(f"{given} without {name}: give --{name} or set {variable}")
    return Place(coordinator, num_processes, process_id, local, source)


def first_host(nodes: str) -> str:
    """Returns the first of SLURM's list of hosts: `"tpu[007-009,12]-ib,gpu1"` -> `"tpu007-ib"`."""
    found = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", nodes)
    if found is None:
        raise UserError(f"SLURM_STEP_NODELIST='{nodes}' names no host")
    return "".join(part or "" for part in found.groups())


def _slurm_port(environ: Mapping[str, str]) -> int:
    job, step = _number(environ, "SLURM_JOB_ID") or 0, _number(environ, "SLURM_STEP_ID") or 0
    return FIRST_PORT + (job + 509 * step) % _N_PORTS


def _slurm_devices(environ: Mapping[str, str]) -> tuple[int, ...] | None:
    tasks, hosts = (
        _number(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
        _number(environ, "SLURM_STEP_NUM_NODES", "SLURM_NNODES"),
    )
    # SLURM has dealt the devices out already
    bound = "," not in environ.get("CUDA_VISIBLE_DEVICES", ",")
    return (
        None
        if bound or tasks is None or hosts is None or tasks <= hosts
        else (_number(environ, "SLURM_LOCALID") or 0,)
    )


def _tpu_place(environ: Mapping[str, str]) -> Place | None:
    hosts = [host for host in environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    slices, number = (
        _number(environ, "MEGASCALE_NUM_SLICES") or 1,
        _number(environ, "MEGASCALE_SLICE_ID") or 0,
    )
    if not _wants_tpu(environ) or not hosts or len(hosts) * slices == 1:
        return None
    worker = _number(environ, "TPU_WORKER_ID")
    if worker is None:
        raise UserError(
            f"TPU_WORKER_HOSTNAMES names {len(hosts)} hosts, but TPU_WORKER_ID does not say which this is"
        )
    first = environ.get("MEGASCALE_COORDINATOR_ADDRESS", hosts[0]).split(":")[0]
    return Place(
        f"{first}:{_TPU_PORT}", len(hosts) * slices, len(hosts) * number + worker, source="TPU pod"
    )


def _wants_tpu(environ: Mapping[str, str]) -> bool:
    return environ.get("JAX_PLATFORMS", "") in ("", "tpu")


def _number(environ: Mapping[str, str], *names: str) -> int | None:
    for name in names:
        if (text := environ.get(name)) is not None:
            if not text.isdecimal():
                raise UserError(f"{name}='{text}' is not a number")
            return int(text)
    return None


def ask_tpu_host(environ: Mapping[str, str], devices: Path = Path("/dev")) -> bool:
    """True on a TPU host whose slice is known to Google's metadata server alone, which JAX can
    ask."""
    if not _wants_tpu(environ):
        return False
    has_tpu = any((devices / name).exists() for name in ("accel0", "vfio/0"))
    return has_tpu and not {"TPU_WORKER_HOSTNAMES", "TPU_SKIP_MDS_QUERY"} & set(environ)
