from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.variants import TOGETHER


def on_eight_devices(script: str, *arguments: str) -> list[str]:
    """Lines that a script prints. Fake devices must be asked for before JAX starts, hence the process."""
    path = Path(__file__).with_name(script)
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment = {**os.environ, **flags, "PYTHONPATH": str(path.parents[2])}
    done = subprocess.run([sys.executable, str(path), *arguments], env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


@pytest.mark.multiprocess
@pytest.mark.slow
def test_eight_devices_equal_one(tmp_path):
    assert on_eight_devices("multidevice_train.py", str(tmp_path)) == [
        "created sharded",
        "full equals one device",
        *(f"{name} equals one device" for name in TOGETHER),
        "resumed on another mesh",
        "rows that do not divide are told",
    ]


@pytest.mark.multiprocess
@pytest.mark.slow
def test_lanes_on_eight_devices_equal_those_on_one():
    assert on_eight_devices("multidevice_lanes.py") == [
        "lane:8 equals one device",
        "lane:2,data:2,fsdp:2 equals one device",
        "lane:4,tensor:2 equals one device",
        "lanes are split, and not copied",
        "lanes that do not divide are told",
    ]
