"""Runs command lines of mains, each in a process of its own that has everything imported
already: seconds saved each time.

python preloaded.py experiments.compare ...     then on stdin a line a command, {"module", "arguments", "hidden", "stdin", "kill"};
                                                on stdout a line an outcome, {"code", "out", "err", "operations"}

`kill` is [folder, n]: the process ends before its n-th file operation there (see tests/kills.py);
`operations` counts them.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from pathlib import Path

from tests import compiling, kills


def run(module: str, arguments: list[str], hidden: list[str], stdin: str, kill: list) -> dict:
    counter = kills.Counter()
    with (
        tempfile.TemporaryFile("w+") as given,
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
    ):
        given.write(stdin)
        given.seek(0)
        child = os.fork()  # nothing has started a thread of ours or a JAX backend yet
        if child == 0:
            for number, file in enumerate((given, out, err)):
                os.dup2(file.fileno(), number)
            sys.modules.update(dict.fromkeys(hidden))  # None: as if they were not installed
            sys.argv = [module, *arguments]
            if kill:
                kills.die_at(Path(kill[0]), kill[1], counter)
            importlib.import_module(module).main()
        _, status = os.waitpid(child, 0)
        out.seek(0)
        err.seek(0)
        return {
            "code": os.waitstatus_to_exitcode(status),
            "out": out.read(),
            "err": err.read(),
            "operations": counter.value,
        }


if __name__ == "__main__":
    for name in (*sys.argv[1:], "scipy.stats"):  # the last one kafjax imports late
        importlib.import_module(name)
    compiling.collect_rarely()
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)
