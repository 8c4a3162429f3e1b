"""The comparison of answering on a tiny model: both sides make the same tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import compiling, tiny

ROOT = Path(__file__).parents[2]


def benchmark(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.serve_speed", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=compiling.environment(), capture_output=True, text=True
    )


@pytest.mark.slow
def test_both_sides_make_the_same_tokens_and_the_ratio_is_written(tmp_path):
    model = tiny.write_gemma(tmp_path / "gemma")
    chosen = ("prefill_8", "decode_1", "decode_32")
    sizes = (f"--cases={','.join(chosen)}", "--prompt=24", "--tokens=6", "--rounds=2", "--warmup=1")
    done = benchmark(f"--model={model}", *sizes, f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "serve_speed_float32.json").read_text())
    assert list(result["cases"]) == list(chosen) and result["floor_seconds"] > 0
    for case in result["cases"].values():
        assert all(
            0 < side["min"] <= side["median"] <= side["max"]
            for side in (case["kafjax"], case["torch"])
        )
        assert case["ratio"]["value"] == pytest.approx(
            case["kafjax"]["median"] / case["torch"]["median"]
        )
    table = (tmp_path / "serve_speed_float32.md").read_text()
    assert table in done.stdout and "| decode, batch 32 |" in table


def test_an_unknown_case():
    done = benchmark("--cases=decode_2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip().splitlines()[-1].startswith("error: unknown case 'decode_2'.")
