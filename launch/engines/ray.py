"""Workers as tasks of a Ray cluster, which starts those of a lost node again on another. The runs
go on through the sweep's folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kafjax.core.errors import UserError
from launch.config import Launch
from launch.ledger import Ledger

_FOREVER = -1  # tries of a task whose node died


class RayPool:
    """Stands in for `launch.worker.Pool`: the same work, done by tasks on the cluster at
    `config.address`.

    Args:
      directory: the checkout that workers run from, on every node.
      arguments: of `launch.sweep` beside the folder.
    """

    def __init__(self, ledger: Ledger, config: Launch, directory: Path, arguments: Sequence[str]):
        self._config, self._directory = config, str(directory)
        self._command = [
            sys.executable,
            "-m",
            "launch.sweep",
            f"--folder={ledger.folder}",
            *arguments,
        ]
        self._stopped = False

    def stop(self) -> None:
        """Asks for the end: workers get SIGTERM, and what they were at is left open."""
        self._stopped = True

    def run(self, show: Callable[[], None]) -> None:
        """Works until the tasks end or `stop` is called. Calls `show` every second.

        Raises:
          UserError: Ray is not installed, there is no cluster, or a worker ended in a way that the
            ledger does not tell.
        """
        ray = connected(self._config.address)
        try:
            others = dict(self._config.resources)
            # Ray has a word of its own for GPUs
            asked = {"num_cpus": self._config.cores_per_run or 1, "num_gpus": others.pop("GPU", 0)}
            worker = ray.remote(
                **asked, resources=others, max_retries=_FOREVER, retry_exceptions=[InterruptedError]
            )(_worker())
            tasks = [
                worker.remote(self._command, self._directory) for _ in range(self._config.workers)
            ]
            open_tasks, cancelled = list(tasks), False
            while open_tasks:
                show()
                if self._stopped and not cancelled:
                    cancelled = True
                    for task in open_tasks:
                        ray.cancel(task)
                _, open_tasks = ray.wait(open_tasks, num_returns=len(open_tasks), timeout=1.0)
            show()
            if not cancelled:
                _check(ray, tasks)
        finally:
            ray.shutdown()


def connected(address: str) -> Any:
    """Connects to a cluster and returns the module. Raises `UserError` if Ray is not installed, or
    no cluster answers."""
    try:
        import ray
    except ImportError:
        raise UserError("--engine=ray needs Ray: pip install 'ray>=2.50'") from None
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError) as error:
        raise UserError(
            f"--address={address}: no Ray cluster answers; start one with `ray start --head`"
        ) from error
    return ray


def _worker() -> Callable[[list[str], str], int]:
    """Returns the task: a function within a function, which Ray sends as code, so that nodes import
    nothing to read it."""

    def work(command: list[str], directory: str) -> int:
        import subprocess

        process = subprocess.Popen(command, cwd=directory)
        try:
            code = process.wait()
        except KeyboardInterrupt:  # cancelled
            process.terminate()
            return process.wait()
        if code in (143, -15):
            raise InterruptedError("preempted")  # Ray starts it again
        return code

    return work


def _check(ray: Any, tasks: Sequence[Any]) -> None:
    """Raises `UserError` for a worker that crashed. Failed runs (exit code 2) are told by the
    ledger."""
    try:
        codes = ray.get(list(tasks))
    except ray.exceptions.RayError as error:
        raise UserError(
            f"a worker of the Ray cluster ended: {str(error).splitlines()[0]}"
        ) from error
    if strange := [code for code in codes if code not in (0, 2)]:
        raise UserError(
            f"{len(strange)} workers of the Ray cluster ended with exit code {strange[0]}; see Ray's session folder"
        )
