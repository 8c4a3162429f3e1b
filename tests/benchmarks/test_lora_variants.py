"""The benchmark of variants on a tiny model: what it writes adds up, and bad input is told."""

from __future__ import annotations

import json

import pytest

from tests import tiny


@pytest.mark.slow
@pytest.mark.multiprocess
def test_each_variant_is_measured_beside_the_plain_one(benchmark, tmp_path):
    model = tiny.write_gemma(tmp_path / "gemma")
    done = benchmark(
        f"--model={model}",
        "--seq_len=16",
        "--rank=4",
        "--rounds=2",
        "--variants=dora,pissa",
        f"--out={tmp_path}",
    )
    assert done.code == 0, done.err
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
    assert (tmp_path / "lora_variants.md").read_text() in done.out


@pytest.mark.multiprocess
def test_an_unknown_variant_is_told(benchmark, tmp_path):
    done = benchmark("--variants=dorra", f"--out={tmp_path}")
    assert (done.code, done.out) == (2, "")
    assert (
        done.err.strip().splitlines()[-1]
        == "error: --variants: unknown 'dorra'. Did you mean 'dora'?"
    )
