"""Runs of many hosts on a Ray cluster: each gets a slice of TPUs for itself, and a process on each
of the slice's hosts.

Ray reserves whole slices (`ray.util.tpu.SlicePlacementGroup`). Host 0 keeps the ledger, as with
JobSets. When a host dies or is preempted, the processes of its slice are stopped, the slice is given
back, and the run, which is open again, gets the next free one.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kafjax.core.errors import UserError
from kafjax.core.progress import say
from kafjax.parallel.chips import Slice
from launch.config import Launch
from launch.engines.jobset import accelerator, hosts_of
from launch.engines.ray import connected
from launch.ledger import DONE, FAILED, Ledger
from launch.spec import Run

_WAIT_SECONDS = 5.0  # for a slice to be free, before looking at the others again
_MOST_EMPTY = 3  # starts of a run in a row that reach no attempt


@dataclasses.dataclass
class _Gang:
    """The processes of one run on a slice."""

    run: Run
    slice: Any
    tasks: list[Any]
    attempts: int  # that the ledger held before


class SlicePool:
    """Stands in for `launch.worker.Pool`, with as many runs at a time as there are slices.

    Args:
      topology: of one run's slice.
      directory: the checkout that processes run from, on every node.
      arguments: of `launch.sweep` beside folder and run.
    """

    def __init__(
        self,
        ledger: Ledger,
        config: Launch,
        topology: Slice,
        directory: Path,
        arguments: Sequence[str],
    ):
        if not topology.is_tpu or topology.n_slices > 1:
            raise UserError(
                f"--engine=ray books one slice of TPUs a run; --topology={topology.name} is none"
            )
        self._ledger, self._config, self._topology = ledger, config, topology
        self._directory, self._arguments = str(directory), list(arguments)
        self._stopped = False
        self._empty: dict[str, int] = {}

    def stop(self) -> None:
        """Asks for the end: runs save and are left open."""
        self._stopped = True

    def run(self, show: Callable[[], None]) -> None:
        """Works until all runs are settled or `stop` is called. Calls `show` every second or so.

        Raises:
          UserError: Ray is not installed, there is no cluster, or processes end before they reach
            the ledger.
        """
        ray = connected(self._config.address)
        gangs: list[_Gang] = []
        try:
            while not self._stopped:
                show()
                busy = {gang.run.id for gang in gangs}
                open_runs = [run for run in self._ledger.runs if self._is_open(run)]
                waiting = [run for run in open_runs if run.id not in busy]
                if not open_runs and not gangs:
                    break
                if waiting and len(gangs) < self._config.workers:
                    gangs += self._start(ray, waiting[0])
                ended = [gang for gang in gangs if self._has_ended(ray, gang)]
                for gang in ended:
                    self._release(ray, gang)
                    self._check(gang)
                gangs = [gang for gang in gangs if gang not in ended]
            show()
        finally:
            for gang in gangs:
                self._release(ray, gang)
            ray.shutdown()

    def _is_open(self, run: Run) -> bool:
        return self._ledger.state(run, self._config.retries).name not in (DONE, FAILED)

    def _start(self, ray: Any, run: Run) -> list[_Gang]:
        """Starts a run on a free slice; empty if there is none."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
        from ray.util.tpu import SlicePlacementGroup

        hosts, chips = hosts_of(self._topology)
        try:
            taken = SlicePlacementGroup(
                topology="x".join(map(str, self._topology.shape)),
                accelerator_version=accelerator(self._topology).rpartition("-")[0],
                resources_per_bundle={"CPU": self._config.cores_per_run or 1, "TPU": chips},
                strategy="STRICT_SPREAD",
                chips_per_vm=chips,
                head_reservation_timeout_s=_WAIT_SECONDS,
            )
        except TimeoutError:
            return []
        except (RuntimeError, ValueError) as error:
            self._count(run, f"Ray reserves no slice for it ({str(error).splitlines()[0]})")
            return []
        group = taken.placement_group
        ready, _ = ray.wait([group.ready()], timeout=_WAIT_SECONDS)
        if not ready:
            taken.shutdown()
            return []

        def on(host: int, function: Callable[..., Any]) -> Any:
            place = PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=host
            )
            asked = {"num_cpus": self._config.cores_per_run or 1, "resources": {"TPU": chips}}
            return ray.remote(**asked, max_retries=0, scheduling_strategy=place)(function)

        address, work = _functions()
        attempts = len(self._ledger.state(run, self._config.retries).attempts)
        try:
            coordinator = ray.get(on(0, address).remote(), timeout=60)
        except ray.exceptions.RayError:  # its node has just died
            taken.shutdown()
            return []
        command = [sys.executable, "-m", "launch.sweep", f"--folder={self._ledger.folder}"]
        command += [f"--only={run.id}", *self._arguments]
        tasks = [
            on(host, work).remote(command, self._directory, coordinator, hosts, host)
            for host in range(hosts)
        ]
        return [_Gang(run, taken, tasks, attempts)]

    def _has_ended(self, ray: Any, gang: _Gang) -> bool:
        """True once all processes have ended well, or one has not: the others would wait for it."""
        ended, others = ray.wait(gang.tasks, num_returns=len(gang.tasks), timeout=1.0)
        try:
            return any(code != 0 for code in ray.get(ended)) or not others
        except ray.exceptions.RayError:
            say("sweep", f"{gang.run.id}: a host of its slice is lost; it goes on on another slice")
            return True

    def _release(self, ray: Any, gang: _Gang) -> None:
        for task in gang.tasks:
            ray.cancel(task)  # SIGTERM to a process that still runs; it saves
        ray.wait(gang.tasks, num_returns=len(gang.tasks), timeout=60.0)
        gang.slice.shutdown()

    def _check(self, gang: _Gang) -> None:
        state = self._ledger.state(gang.run, self._config.retries)
        if len(state.attempts) > gang.attempts or state.name == DONE:
            self._empty.pop(gang.run.id, None)
        else:
            self._count(
                gang.run, "its processes end before they reach the ledger; see Ray's session folder"
            )

    def _count(self, run: Run, reason: str) -> None:
        """Counts starts in a row that reached nothing. Raises `UserError` for the last that is
        tried."""
        self._empty[run.id] = self._empty.get(run.id, 0) + 1
        if self._empty[run.id] >= _MOST_EMPTY:
            raise UserError(f"{run.id}: {reason}")


def _functions() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns the tasks: functions within a function, which Ray sends as code, so that nodes import
    nothing to read them."""

    def address() -> str:
        import socket

        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def work(command: list[str], directory: str, coordinator: str, n: int, number: int) -> int:
        import os
        import subprocess

        environ = dict(os.environ)
        if "TPU_WORKER_HOSTNAMES" not in environ:  # else the TPU's runtime has numbered the hosts
            environ |= {"JAX_COORDINATOR_ADDRESS": coordinator, "JAX_NUM_PROCESSES": str(n)}
            environ |= {"JAX_PROCESS_ID": str(number)}
        process = subprocess.Popen(command, cwd=directory, env=environ)
        try:
            return process.wait()
        except KeyboardInterrupt:  # cancelled
            process.terminate()
            return process.wait()

    return address, work
