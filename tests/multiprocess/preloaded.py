"""Forks processes that have everything imported already, and run a module as `python -m` does:
seconds saved each time. The first one to ask for a backend starts it.

python -m tests.multiprocess.preloaded MODULE...

Reads a request a line and answers in a line:
  {"module", "arguments", "devices", "environ": [{...} a process], "logs": [[out, err] a process]}   ->   their process ids
  {"wait": process id}                                                                               ->   its exit code
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys

import jax

from tests import compiling


def fork(
    module: str, arguments: list[str], devices: int, environ: dict[str, str], logs: list[str]
) -> int:
    child = os.fork()  # nothing has started a thread of ours or a JAX backend yet
    if child:
        return child
    for number, path in enumerate(logs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(environ)
    jax.config.update("jax_num_cpu_devices", devices)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.exit()


if __name__ == "__main__":
    for module in sys.argv[1:]:
        importlib.import_module(module)
    compiling.collect_rarely()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            reply = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            own = zip(request.pop("environ"), request.pop("logs"), strict=True)
            reply = [fork(**request, environ=environ, logs=logs) for environ, logs in own]
        print(json.dumps(reply), flush=True)
