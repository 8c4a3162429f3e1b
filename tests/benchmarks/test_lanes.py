"""The benchmark of lanes on a tiny model: both sides do the same work, and measurements add up in
one file."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.turns import ratio
from tests import tiny


@pytest.mark.slow
@pytest.mark.multiprocess
def test_measurements_add_up(benchmark, tmp_path):
    model = tiny.write_gemma(tmp_path / "gemma")
    sizes = (f"--model={model}", "--seq_len=16", "--rank=4", "--rounds=2", f"--out={tmp_path}")
    for lanes in ("1,2", "2,3"):
        done = benchmark(*sizes, f"--lanes={lanes}")
        assert done.code == 0, done.err
    cases = json.loads((tmp_path / "lanes.json").read_text())["cases"].values()
    assert sorted(case["lanes"] for case in cases) == [1, 2, 3]
    for case in cases:
        assert case["ratio"]["low"] <= case["ratio"]["value"] <= case["ratio"]["high"]
        speed = case["tokens_per_second"]
        assert case["ratio"]["value"] == pytest.approx(speed["lanes"] / speed["one_after_another"])
        assert case["bytes"]["lanes"] > case["base_bytes"]
    assert (tmp_path / "lanes.md").read_text() in done.out
    assert (tmp_path / "lanes.png").read_bytes().startswith(b"\x89PNG")


def test_ratio_is_that_of_the_medians():
    found = ratio(np.array([1.0, 2.0, 3.0]), np.array([4.0, 6.0, 9.0]))
    assert found["value"] == 3 and found["low"] <= 3 <= found["high"]


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("flag", "told"),
    [("--lanes=two", "'two' is not a number of lanes"), ("--show", "holds no measurement yet")],
)
def test_bad_input_is_told(benchmark, tmp_path, flag, told):
    done = benchmark(flag, f"--out={tmp_path}")
    assert (done.code, done.out) == (2, "")
    assert told in done.err.strip().splitlines()[-1]
