"""The benchmark of variants on a tiny model: what it writes adds up, and bad input is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import compiling, tiny

ROOT = Path(__file__).parents[2]


def benchmark(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.lora_variants", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=compiling.environment(), capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.multiprocess
def test_each_variant_is_measured_beside_the_plain_one(tmp_path):
    model = tiny.write_gemma(tmp_path / "gemma")
    done = benchmark(
        f"--model={model}",
        "--seq_len=16",
        "--rank=4",
        "--rounds=2",
        "--variants=dora,pissa",
        f"--out={tmp_path}",
    )
    assert done.returncode == 0, done.stderr
    cases = json.loads((tmp_path / "lora_variants.json").read_text())["cases"]
    assert list(cases) == ["plain", "dora", "pissa"]
    assert cases["plain"]["ratio"]["value"] == 1
    assert (
        cases["dora"]["trainable_parameters"]
        > cases["plain"]["trainable_parameters"]
        == cases["pissa"]["trainable_parameters"]
    )
    for case in cases.values():
        assert (
            case["ratio"]["low"] <= case["ratio"]["value"] <= case["ratio"]["high"]
            and case["start_seconds"] > 0
        )
    assert (tmp_path / "lora_variants.md").read_text() in done.stdout


@pytest.mark.multiprocess
def test_an_unknown_variant_is_told(tmp_path):
    done = benchmark("--variants=dorra", f"--out={tmp_path}")
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr.strip().splitlines()[-1]
        == "error: --variants: unknown 'dorra'. Did you mean 'dora'?"
    )
