"""One side of a row in a process of its own, which gives its peak memory. `benchmarks.processes` runs

    python -m benchmarks.side MODULE:FUNCTION ARGUMENTS FOLDER

`FUNCTION(**ARGUMENTS)` (JSON) prepares a `Side`. A line of JSON on stdout says that it is ready; then
each line on stdin asks for a call, and a line of JSON tells its seconds. The first call's result goes
to FOLDER/result.npy. What libraries print goes to stderr.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Side:
    """Work that is ready to be called, done when the call returns.

    Attributes:
      facts: `units` of a call (tokens, texts); where they are known `flops` and `bytes`, the
        arithmetic and the weights read; `note`, told under the table.
    """

    call: Callable[[], np.ndarray]
    facts: Mapping[str, Any]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(**told: Any) -> None:
        print(json.dumps(told), file=answers, flush=True)

    name, arguments, folder = sys.argv[1:]
    module, function = name.split(":")
    try:
        side = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    except ModuleNotFoundError as error:
        tell(missing=error.name)
        return
    tell(facts=side.facts)
    for n, _ in enumerate(sys.stdin):
        began = time.perf_counter()
        result = side.call()
        seconds = time.perf_counter() - began
        if n == 0:
            np.save(Path(folder) / "result.npy", result)
        tell(seconds=seconds, peak=peak_bytes())


def peak_bytes() -> int:
    """The highest resident memory of this process by Linux (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if "VmHWM" in line).split()[1])


if __name__ == "__main__":
    main()
