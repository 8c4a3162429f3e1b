"""Starts several real processes on this machine, as a scheduler would on several hosts."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from tests import compiling

ROOT = Path(__file__).parents[2]
WORKER = "tests.multiprocess.worker"
FINETUNE = "experiments.finetune"
SWEEP = "launch.sweep"
STALLED_STEPS = 40  # of the training that is stopped in the middle: a second and more
TIMEOUT = 300  # seconds, of a test's processes; far more than they take


class Ended(NamedTuple):
    code: int
    out: str
    err: str


class Crowd:
    """Processes of one program, and the folder that what they print goes to."""

    def __init__(self, ask: Callable[[Any], Any], pids: list[int], log: Path):
        self._ask, self.pids, self._log = ask, pids, log

    def signal(self, process: int, number: signal.Signals) -> None:
        os.kill(self.pids[process], number)

    def runs(self, process: int = 0) -> bool:
        """False once it has ended; `ended` has not been called."""
        return psutil.Process(self.pids[process]).status() != psutil.STATUS_ZOMBIE

    def text(self, process: int, stream: str = "err") -> str:
        """Output so far; empty before the start."""
        path = self._log / f"{process}.{stream}"
        return path.read_text() if path.exists() else ""

    def wait_until(self, true: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not true():
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"waited {TIMEOUT} s until {what}: {self.text(0)}")
            time.sleep(0.02)

    def kill(self) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def ended(self) -> list[Ended]:
        """Waits for all of them; none is left behind."""
        overdue = threading.Timer(TIMEOUT, self.kill)
        overdue.start()
        codes = [self._ask({"wait": pid}) for pid in self.pids]
        overdue.cancel()
        return [Ended(code, self.text(i, "out"), self.text(i)) for i, code in enumerate(codes)]


class Launcher:
    """`with Launcher() as launcher: launcher.run(WORKER, ["learn", folder], n=2, log=folder)`.

    `modules` are imported once. With `optimised` the processes compile as for a user.
    """

    def __init__(
        self, modules: Sequence[str] = (FINETUNE, SWEEP, WORKER), *, optimised: bool = False
    ):
        self._modules = modules
        self._environ = compiling.environment(optimised=optimised)

    def __enter__(self) -> Launcher:
        script = [sys.executable, "-W", "ignore", "-m", "tests.multiprocess.preloaded"]
        self._process = subprocess.Popen(
            [*script, *self._modules],
            cwd=ROOT,
            env=self._environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def _ask(self, request: Any) -> Any:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self,
        module: str,
        arguments: Sequence[object],
        n: int,
        log: Path,
        devices: int = 1,
        environ: Callable[[int, int], dict[str, str]] | None = None,
    ) -> Crowd:
        """`n` processes of `python -m MODULE ARGUMENTS` with `devices` devices each, which are told
        who they are by `environ(i, n)`."""
        log.mkdir(parents=True, exist_ok=True)
        environ = environ or explicit(free_port())
        request = {
            "module": module,
            "arguments": list(map(str, arguments)),
            "devices": devices,
            "environ": [environ(i, n) for i in range(n)],
            "logs": [[str(log / f"{i}.{stream}") for stream in ("out", "err")] for i in range(n)],
        }
        return Crowd(self._ask, self._ask(request), log)

    def run(
        self,
        module: str,
        arguments: Sequence[object],
        n: int,
        log: Path,
        devices: int = 1,
        **options: Any,
    ) -> list[Ended]:
        """`start`, and all of them have to end well."""
        outcomes = self.start(module, arguments, n, log, devices, **options).ended()
        for i, outcome in enumerate(outcomes):
            assert outcome.code == 0, (
                f"process {i} of {n}: {outcome.code}\n{outcome.out}\n{outcome.err}"
            )
        return outcomes


def free_port(first: int = 0) -> int:
    """One from `first` on, or any."""
    with socket.socket() as probe:
        while True:
            try:
                probe.bind(("127.0.0.1", first))
                return probe.getsockname()[1]
            except OSError:
                first += 1


def explicit(port: int) -> Callable[[int, int], dict[str, str]]:
    return lambda i, n: {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(n),
        "JAX_PROCESS_ID": str(i),
    }


def slurm(job: int) -> Callable[[int, int], dict[str, str]]:
    """Variables that srun sets for a step of `n` tasks on one host."""
    step = {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "1",
    }
    return lambda i, n: {
        **step,
        "SLURM_STEP_NUM_TASKS": str(n),
        "SLURM_PROCID": str(i),
        "SLURM_LOCALID": str(i),
    }


def kubernetes(port: int) -> Callable[[int, int], dict[str, str]]:
    """Variables that an Indexed Job and its manifest set."""
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JAX_COORDINATOR_ADDRESS": f"localhost:{port}"}
    return lambda i, n: {**pod, "JAX_NUM_PROCESSES": str(n), "JOB_COMPLETION_INDEX": str(i)}


def tpu_pod(i: int, n: int) -> dict[str, str]:
    """Variables that Google's Kubernetes sets on the hosts of a slice. JAX was told at its import
    that there is no TPU."""
    return {
        "TPU_WORKER_HOSTNAMES": ",".join(["localhost"] * n),
        "TPU_WORKER_ID": str(i),
        "JAX_PLATFORMS": "",
    }
