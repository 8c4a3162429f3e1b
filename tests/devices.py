"""Scripts of tests that need eight devices."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests import compiling


def on_eight_devices(script: Path, *arguments: object, optimised: bool = False) -> list[str]:
    """Lines that a script prints. Fake devices must be asked for before JAX starts, hence the
    process."""
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(
        command,
        env=compiling.environment(devices=8, optimised=optimised),
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()
