"""Scripts of tests that need eight devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def on_eight_devices(script: Path, *arguments: object) -> list[str]:
    """Lines that a script prints. Fake devices must be asked for before JAX starts, hence the process."""
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment = {**os.environ, **flags, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()
