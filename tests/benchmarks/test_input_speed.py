"""The benchmark of the input on a tiny case: everything that it names can be measured."""

from __future__ import annotations

import pytest

from benchmarks import input_speed


def test_every_call_is_measured(tmp_path, monkeypatch):
    for package in ("array_record", "grain"):
        pytest.importorskip(package, reason=f"{package} is not installed (extra [data])")
    monkeypatch.setattr(input_speed, "N_ROWS", 16)
    found = {
        name: input_speed.milliseconds(call, 2)
        for name, call in input_speed.calls(tmp_path, 2, 32, 3)
    }
    assert len(found) == 7
    assert all(0 <= low <= middle <= high for low, middle, high in found.values())
    # A batch costs something, and asking after a signal next to nothing.
    assert found["batch of 2 x 32, packed rows"][1] > 0.01 > found["SIGTERM: a step"][0]
