from __future__ import annotations

from pathlib import Path

import pytest

from tests.devices import on_eight_devices


@pytest.mark.multiprocess
@pytest.mark.slow
def test_replies_of_eight_devices_are_those_of_one(tmp_path):
    assert on_eight_devices(Path(__file__).with_name("multidevice_generate.py"), tmp_path) == [
        "data:2,fsdp:2,tensor:2 answers as one device",
        "fsdp:8 answers as one device",
    ]
