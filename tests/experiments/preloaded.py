"""Runs command lines of one main, each in a process of its own that has everything imported already: seconds saved each time.

python preloaded.py experiments.compare     then on stdin a line a command, {"arguments", "hidden", "stdin"};
                                            on stdout a line an outcome, {"code", "out", "err"}
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile


def run(module, arguments: list[str], hidden: list[str], stdin: str) -> dict:
    with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        given.write(stdin)
        given.seek(0)
        child = os.fork()  # nothing has started a thread of ours or a JAX backend yet
        if child == 0:
            for number, file in enumerate((given, out, err)):
                os.dup2(file.fileno(), number)
            sys.modules.update(dict.fromkeys(hidden))  # None: as if they were not installed
            sys.argv = [module.__name__, *arguments]
            module.main()
        _, status = os.waitpid(child, 0)
        out.seek(0)
        err.seek(0)
        return {"code": os.waitstatus_to_exitcode(status), "out": out.read(), "err": err.read()}


if __name__ == "__main__":
    main = importlib.import_module(sys.argv[1])
    for line in sys.stdin:
        print(json.dumps(run(main, **json.loads(line))), flush=True)
