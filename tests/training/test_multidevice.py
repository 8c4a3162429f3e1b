from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.multiprocess
@pytest.mark.slow
def test_eight_devices_equal_one(tmp_path):
    """Fake devices must be asked for before JAX starts, hence the process."""
    script = Path(__file__).with_name("multidevice_train.py")
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment = {**os.environ, **flags, "PYTHONPATH": str(script.parents[2])}
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines() == [
        "created sharded",
        "full equals one device",
        "lora equals one device",
        "resumed on another mesh",
        "rows that do not divide are told",
    ]
