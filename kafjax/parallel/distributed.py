"""Start-up as one of many processes. Their number and ranks come from SLURM, Kubernetes, a TPU pod, or are given explicitly.

Every process runs the same program on its own devices. All make the same calls on arrays that are sharded over the devices of all; only
process 0 writes shared files (metrics, progress, results). With one process everything here does nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import sys
import threading
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from kafjax.core.errors import Preempted, SharedError, UserError, report
from kafjax.core.progress import silence

T = TypeVar("T")
TIMEOUT_SECONDS = 300
_MESSAGE_BYTES = 1024
_FIRST_PORT, _N_PORTS = 61_440, 4_096  # ports that a SLURM job's number is mapped to
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
        told = f"process_id={self.process_id}, num_processes={self.num_processes} (from {self.source})"
        if not 0 <= self.process_id < self.num_processes:
            raise UserError(f"{told}: processes are numbered from 0 to num_processes - 1")
        if not re.fullmatch(r"\S+:\d+", self.coordinator):
            raise UserError(f"coordinator='{self.coordinator}' (from {self.source}) is not of the form host:port, say 10.0.0.1:1234")


def find_place(
    environ: Mapping[str, str], coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Place | None:
    """Finds this process's place. None if it is alone, or on a TPU host that only the metadata server knows.

    Explicit values, given as arguments or as `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, come first. Then:
      SLURM: a step of several tasks (`srun`). Process 0's host listens on a port that follows from the job's and step's number. Where
        a host runs several tasks, each takes one accelerator of those that it sees.
      Kubernetes: an Indexed Job or a JobSet, whose pods know their `JOB_COMPLETION_INDEX`; how many they are and where process 0 is
        has to stand in the manifest, as `JAX_NUM_PROCESSES` and `JAX_COORDINATOR_ADDRESS`.
      TPU pods: a process a host of one or several slices, as Google's Kubernetes says (`TPU_WORKER_HOSTNAMES`, `TPU_WORKER_ID`,
        `MEGASCALE_*`); not where `JAX_PLATFORMS` leaves the TPUs alone.

    Raises:
      UserError: something is missing or not a number.
    """
    coordinator = coordinator or environ.get("JAX_COORDINATOR_ADDRESS")
    num_processes = _number(environ, "JAX_NUM_PROCESSES") if num_processes is None else num_processes
    process_id = _number(environ, "JAX_PROCESS_ID") if process_id is None else process_id
    slurm = "SLURM_STEP_NODELIST" in environ and "SLURM_PROCID" in environ
    source, local = "flags", None
    if slurm and num_processes is None:
        source = "SLURM"
        num_processes = _number(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
        process_id = _number(environ, "SLURM_PROCID") if process_id is None else process_id
        coordinator = coordinator or f"{first_host(environ['SLURM_STEP_NODELIST'])}:{_slurm_port(environ)}"
        local = _slurm_devices(environ)
    elif process_id is None and "JOB_COMPLETION_INDEX" in environ and num_processes is not None:
        source, process_id = "Kubernetes", _number(environ, "JOB_COMPLETION_INDEX")
    elif num_processes is None and process_id is None:
        return _tpu_place(environ)
    if (num_processes is None and process_id is None) or num_processes == 1:
        return None
    if coordinator is None or num_processes is None or process_id is None:
        values = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
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
    return _FIRST_PORT + (job + 509 * step) % _N_PORTS


def _slurm_devices(environ: Mapping[str, str]) -> tuple[int, ...] | None:
    tasks, hosts = _number(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), _number(environ, "SLURM_STEP_NUM_NODES", "SLURM_NNODES")
    bound = "," not in environ.get("CUDA_VISIBLE_DEVICES", ",")  # SLURM has dealt the devices out already
    return None if bound or tasks is None or hosts is None or tasks <= hosts else (_number(environ, "SLURM_LOCALID") or 0,)


def _tpu_place(environ: Mapping[str, str]) -> Place | None:
    hosts = [host for host in environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    slices, number = _number(environ, "MEGASCALE_NUM_SLICES") or 1, _number(environ, "MEGASCALE_SLICE_ID") or 0
    if not _wants_tpu(environ) or not hosts or len(hosts) * slices == 1:
        return None
    worker = _number(environ, "TPU_WORKER_ID")
    if worker is None:
        raise UserError(f"TPU_WORKER_HOSTNAMES names {len(hosts)} hosts, but TPU_WORKER_ID does not say which this is")
    first = environ.get("MEGASCALE_COORDINATOR_ADDRESS", hosts[0]).split(":")[0]
    return Place(f"{first}:{_TPU_PORT}", len(hosts) * slices, len(hosts) * number + worker, source="TPU pod")


def _wants_tpu(environ: Mapping[str, str]) -> bool:
    return environ.get("JAX_PLATFORMS", "") in ("", "tpu")


def _number(environ: Mapping[str, str], *names: str) -> int | None:
    for name in names:
        if (text := environ.get(name)) is not None:
            if not text.isdecimal():
                raise UserError(f"{name}='{text}' is not a number")
            return int(text)
    return None


def _ask_tpu_host(environ: Mapping[str, str], devices: Path = Path("/dev")) -> bool:
    """True on a TPU host whose slice is known to Google's metadata server alone, which JAX can ask."""
    if not _wants_tpu(environ):
        return False
    has_tpu = any((devices / name).exists() for name in ("accel0", "vfio/0"))
    return has_tpu and not {"TPU_WORKER_HOSTNAMES", "TPU_SKIP_MDS_QUERY"} & set(environ)


@contextlib.contextmanager
def processes(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout_seconds: int = TIMEOUT_SECONDS,
) -> Generator[None]:
    """`with processes(): ...` joins the others, if there are any; before JAX is used for anything else.

    An error in one process ends it at once, without waiting for the others at the exit (JAX's own exit takes minutes). The others stop at
    their next exchange with it, unless SLURM or Kubernetes ends them sooner.

    Raises:
      UserError: see `find_place`; and if not all processes have come together within `timeout_seconds`.
    """
    place = find_place(os.environ, coordinator, num_processes, process_id)
    if place is not None:
        waits_for = f"the coordinator at {place.coordinator}" if place.process_id else f"the other {place.num_processes - 1} processes"
        message = (
            f"process {place.process_id} of {place.num_processes} (from {place.source}) waited {timeout_seconds} s for {waits_for}: "
            "check that all processes were started, the same number is said to each, and that host and port can be reached"
        )
        with _deadline(timeout_seconds, message):
            jax.distributed.initialize(
                place.coordinator,
                place.num_processes,
                place.process_id,
                local_device_ids=place.local_devices,
                cluster_detection_method="deactivate",
                initialization_timeout=timeout_seconds + 60,  # JAX would abort with a trace of C++
            )
    elif num_processes != 1 and _ask_tpu_host(os.environ):
        message = f"waited {timeout_seconds} s for the other hosts of this TPU slice: is the same command running on all of them?"
        with _deadline(timeout_seconds, message):
            jax.distributed.initialize(initialization_timeout=timeout_seconds + 60)
    if jax.process_count() > 1 and not is_main():
        silence()
    try:
        yield
    except (Preempted, SharedError):
        raise  # all processes leave together
    except BaseException as error:
        if jax.process_count() == 1 or (isinstance(error, SystemExit) and not error.code):
            raise
        code = error.code if isinstance(error, SystemExit) else report(error)
        print(f"process {jax.process_index()} of {jax.process_count()} stops: the others cannot go on", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


@contextlib.contextmanager
def _deadline(seconds: float, message: str) -> Generator[None]:
    """Ends the process with one line if the block takes longer: JAX would abort it."""

    def end() -> None:
        print(f"error: {message}", file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def is_main() -> bool:
    """True in process 0, which writes shared files."""
    return jax.process_index() == 0


def all_agree(value: bool) -> bool:
    """True if `value` is true in every process. A collective: all processes must call it."""
    return value if jax.process_count() == 1 else bool(np.all(multihost_utils.process_allgather(np.bool_(value))))


def of_main(value: bool) -> bool:
    """Returns process 0's `value` in every process. A collective: all processes must call it."""
    return value if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(np.bool_(value)))


def together(action: Callable[[], T]) -> T:
    """Runs `action` in every process and returns its result once it has succeeded in all. A collective.

    Raises `SharedError` in all with the message of the first process that raised a `UserError`.
    """
    if jax.process_count() == 1:
        return action()
    message, result = "", None
    try:
        result = action()
    except UserError as error:
        message = str(error) or type(error).__name__
    told = np.zeros(_MESSAGE_BYTES, np.uint8)
    data = message.encode()[:_MESSAGE_BYTES]
    told[: len(data)] = np.frombuffer(data, np.uint8)
    for of_process in np.asarray(multihost_utils.process_allgather(told)):
        if of_process.any():
            raise SharedError(of_process.tobytes().rstrip(b"\0").decode(errors="ignore"))
    return cast(T, result)  # it is there, or a message was


def wait_for_all(what: str) -> None:
    """Returns when all processes have called it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def spread(tree: Any, shardings: Any) -> Any:
    """Does what `jax.device_put` does, for devices of many processes: each process has the whole arrays and places its devices' parts.

    Arrays that are sharded over processes already are only moved.
    """

    def place(x: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, sharding)
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda x: place(x, shardings), tree)
    return jax.tree.map(place, tree, shardings)


def to_host(tree: Any) -> Any:
    """Gathers whole arrays as numpy in process 0, one after another; other processes get None instead. A collective.

    One layer of a stacked parameter is gathered at a time, and is whole on every device meanwhile.
    """

    def gather(x: jax.Array) -> np.ndarray | None:
        if x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x) if is_main() else None
        whole = NamedSharding(cast(NamedSharding, x.sharding).mesh, PartitionSpec())
        if x.ndim < 3:
            return gather(_copy(whole)(x))
        take = _take_layer(whole)
        out = np.empty(x.shape, x.dtype) if is_main() else None
        for i in range(len(x)):
            layer = take(x, np.int32(i))
            if out is not None:
                out[i] = layer
        return out

    return jax.tree.map(gather, tree)


# One function per place, so that parameters of one shape share a program.
@functools.cache
def _copy(sharding: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=sharding)


@functools.cache
def _take_layer(sharding: NamedSharding) -> Callable[[jax.Array, np.int32], jax.Array]:
    return jax.jit(lambda x, i: jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False), out_shardings=sharding)
