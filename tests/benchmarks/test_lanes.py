"""The benchmark of lanes on a tiny model: both sides do the same work, and measurements add up in
one file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.turns import ratio
from tests import compiling, tiny

ROOT = Path(__file__).parents[2]


def benchmark(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.lanes", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=compiling.environment(), capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.multiprocess
def test_measurements_add_up(tmp_path):
    model = tiny.write_gemma(tmp_path / "gemma")
    sizes = (f"--model={model}", "--seq_len=16", "--rank=4", "--rounds=2", f"--out={tmp_path}")
    for lanes in ("1,2", "2,3"):
        done = benchmark(*sizes, f"--lanes={lanes}")
        assert done.returncode == 0, done.stderr
    cases = json.loads((tmp_path / "lanes.json").read_text())["cases"].values()
    assert sorted(case["lanes"] for case in cases) == [1, 2, 3]
    for case in cases:
        assert case["ratio"]["low"] <= case["ratio"]["value"] <= case["ratio"]["high"]
        speed = case["tokens_per_second"]
        assert case["ratio"]["value"] == pytest.approx(speed["lanes"] / speed["one_after_another"])
        assert case["bytes"]["lanes"] > case["base_bytes"]
    assert (tmp_path / "lanes.md").read_text() in done.stdout
    assert (tmp_path / "lanes.png").read_bytes().startswith(b"\x89PNG")


def test_ratio_is_that_of_the_medians():
    found = ratio(np.array([1.0, 2.0, 3.0]), np.array([4.0, 6.0, 9.0]))
    assert found["value"] == 3 and found["low"] <= 3 <= found["high"]


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("flag", "told"),
    [("--lanes=two", "'two' is not a number of lanes"), ("--show", "holds no measurement yet")],
)
def test_bad_input_is_told(tmp_path, flag, told):
    done = benchmark(flag, f"--out={tmp_path}")
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr.strip().splitlines()[-1]
