"""The comparison of answering on a tiny model: both sides make the same tokens."""

from __future__ import annotations

import json

import pytest

from tests import tiny


@pytest.mark.slow
def test_both_sides_make_the_same_tokens_and_the_ratio_is_written(benchmark, tmp_path):
    model = tiny.write_gemma(tmp_path / "gemma")
    chosen = ("prefill_8", "decode_1", "decode_32")
    sizes = (f"--cases={','.join(chosen)}", "--prompt=24", "--tokens=6", "--rounds=2", "--warmup=1")
    done = benchmark(f"--model={model}", *sizes, f"--out={tmp_path}")
    assert done.code == 0, done.err
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
    assert table in done.out and "| decode, batch 32 |" in table


def test_an_unknown_case(benchmark):
    done = benchmark("--cases=decode_2")
    assert (done.code, done.out) == (2, "")
    assert done.err.strip().splitlines()[-1].startswith("error: unknown case 'decode_2'.")
