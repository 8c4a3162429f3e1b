from __future__ import annotations

from pathlib import Path

import pytest

from tests.devices import on_eight_devices
from tests.variants import TOGETHER

HERE = Path(__file__).parent


@pytest.mark.multiprocess
@pytest.mark.slow
def test_eight_devices_equal_one(tmp_path):
    assert on_eight_devices(HERE / "multidevice_train.py", tmp_path) == [
        "created sharded",
        "parameters are held once",
        "full equals one device",
        *(f"{name} equals one device" for name in TOGETHER),
        "resumed on another mesh",
        "rows that do not divide are told",
    ]


@pytest.mark.multiprocess
@pytest.mark.slow
def test_lanes_on_eight_devices_equal_those_on_one():
    assert on_eight_devices(HERE / "multidevice_lanes.py") == [
        "lane:8 equals one device",
        "lane:2,data:2,fsdp:2 equals one device",
        "lane:4,tensor:2 equals one device",
        "lanes are split, and not copied",
        "lanes that do not divide are told",
    ]


@pytest.mark.multiprocess
@pytest.mark.slow
def test_every_axis_on_eight_devices_equals_one_and_sends_what_it_should():
    assert on_eight_devices(HERE / "multidevice_axes.py") == [
        "data:8 equals one device",
        "fsdp:8 equals one device",
        "tensor:8 equals one device",
        "sequence:8 equals one device",
        "fsdp:2,sequence:2,tensor:2 equals one device",
        "data: gradients are added up once, and nothing else is sent",
        "fsdp: a kernel is gathered at a time, twice a step, and gradients are added up once",
        "tensor: no parameter is sent, and activations are added up 2 times a layer forward and 5 backward",
        "each device holds an eighth of parameters and optimizer state",
        "adafactor equals one device",
        "muon equals one device",
        "experts equals one device",
        "stacks equals one device",
        "auto says why",
        "what does not divide is named",
    ]
