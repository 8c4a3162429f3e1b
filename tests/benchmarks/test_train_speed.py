"""The speed comparison on a tiny model: both sides must do the same work before their times mean
anything."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks.train_speed import CASES
from tests import tiny


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_sides_have_the_same_losses_and_the_ratio_is_written(benchmark, tmp_path, dtype):
    model = tiny.write_gemma(tmp_path / "gemma")
    sizes = ("--rows=2", "--seq_len=48", "--steps=3", "--warmup=2", "--rank=4")
    done = benchmark(f"--model={model}", *sizes, f"--dtype={dtype}", f"--out={tmp_path}")
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "train_speed.json").read_text())
    assert list(result["cases"]) == list(CASES)
    for name, case in result["cases"].items():
        sides = [case["ours"], case["theirs"]]
        assert abs(sides[0]["first_loss"] - sides[1]["first_loss"]) <= (
            1e-3 if dtype == "float32" else 5e-2
        )
        if name.startswith("full"):  # adapters are drawn at random
            # The same was learned too: gradients, clipping and update agree.
            assert sides[0]["last_loss"] < sides[0]["first_loss"] - 1e-2
            assert abs(sides[0]["last_loss"] - sides[1]["last_loss"]) <= (
                1e-3 if dtype == "float32" else 5e-2
            )
        assert all(0 < side["min"] <= side["median"] <= side["max"] for side in sides)
        assert case["ratio"]["low"] <= case["ratio"]["value"] <= case["ratio"]["high"]
        assert case["ratio"]["value"] == pytest.approx(sides[0]["median"] / sides[1]["median"])
    # An adapter starts as no change at all, and the losses on all tokens and on the last ones
    # differ.
    first = {name: case["ours"]["first_loss"] for name, case in result["cases"].items()}
    assert first["lora_all"] == pytest.approx(
        first["full_all"], abs=1e-4 if dtype == "float32" else 5e-2
    )
    assert abs(first["full_all"] - first["full_last16"]) > 1e-2
    table = (tmp_path / "train_speed.md").read_text()
    assert len(re.findall(r"^\| (?:LoRA|full), ", table, re.MULTILINE)) == 4
    assert table in done.out


def test_an_unknown_case(benchmark):
    done = benchmark("--cases=lora_last15")
    assert (done.code, done.out) == (2, "")
    assert (
        done.err.strip().splitlines()[-1]
        == "error: unknown case 'lora_last15'. Did you mean 'lora_last16'?"
    )
