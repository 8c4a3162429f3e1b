"""Start-up as one of many processes (`place` says which), and what they exchange.

Every process runs the same program on its own devices. All make the same calls on arrays that are
sharded over the devices of all; only process 0 writes shared files (metrics, progress, results).
With one process everything here does nothing.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable, Generator
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from kafjax.core.errors import Preempted, SharedError, UserError, report
from kafjax.core.progress import silence
from kafjax.parallel.place import ask_tpu_host, find_place

T = TypeVar("T")
TIMEOUT_SECONDS = 300
_MESSAGE_BYTES = 1024


@contextlib.contextmanager
def processes(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout_seconds: int = TIMEOUT_SECONDS,
) -> Generator[None]:
    """`with processes(): ...` joins the others, if there are any; before JAX is used for anything
    else.

    An error in one process ends it at once, without waiting for the others at the exit (JAX's own
    exit takes minutes). The others stop at their next exchange with it, unless SLURM or Kubernetes
    ends them sooner.

    Raises:
      UserError: see `find_place`; and if not all processes have come together within
        `timeout_seconds`.
    """
    place = find_place(os.environ, coordinator, num_processes, process_id)
    if place is not None:
        waits_for = (
            f"the coordinator at {place.coordinator}"
            if place.process_id
            else f"the other {place.num_processes - 1} processes"
        )
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
    elif num_processes != 1 and ask_tpu_host(os.environ):
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
        print(
            f"process {jax.process_index()} of {jax.process_count()} stops: the others cannot go on",
            file=sys.stderr,
        )
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
    return (
        value
        if jax.process_count() == 1
        else bool(np.all(multihost_utils.process_allgather(np.bool_(value))))
    )


def of_main(value: bool) -> bool:
    """Returns process 0's `value` in every process. A collective: all processes must call it."""
    return (
        value
        if jax.process_count() == 1
        else bool(multihost_utils.broadcast_one_to_all(np.bool_(value)))
    )


def together(action: Callable[[], T]) -> T:
    """Runs `action` in every process and returns its result once it has succeeded in all. A
    collective.

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
    """Does what `jax.device_put` does, for devices of many processes: each process has the whole
    arrays and places its devices' parts.

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
    """Gathers whole arrays as numpy in process 0, one after another; other processes get None
    instead. A collective.

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
    return jax.jit(
        lambda x, i: jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False), out_shardings=sharding
    )
