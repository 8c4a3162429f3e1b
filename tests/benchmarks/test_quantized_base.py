"""The benchmark of quantised bases on a tiny model: measurements add up in one file, and its tables
are read off it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.quantized_base import BASES, learning_table, perplexity_table, stored
from kafjax.core import trees
from tests import tiny


@pytest.mark.slow
@pytest.mark.multiprocess
def test_measurements_add_up(benchmark, tmp_path):
    model = tiny.write_gemma(tmp_path / "gemma", max_position_embeddings=2048)
    for measure in ("steps", "perplexity", "learning"):
        sizes = (
            "--rows=1",
            "--seq_len=16",
            "--rank=4",
            "--rounds=2",
            "--texts=2",
            "--epochs=1",
            "--subjects=2",
        )
        done = benchmark(
            f"--model={model}",
            f"--measure={measure}",
            "--bases=float32,nf4",
            *sizes,
            f"--out={tmp_path}",
        )
        assert done.code == 0, done.err
    results = json.loads((tmp_path / "quantized_base.json").read_text())
    steps = results["steps"]
    assert steps["nf4"]["bytes"]["kernels"] < 0.2 * steps["float32"]["bytes"]["kernels"]
    assert steps["nf4"]["argument_bytes"] < steps["float32"]["argument_bytes"]
    assert results["perplexity"]["nf4"]["tokens"] == results["perplexity"]["float32"]["tokens"]
    assert set(results["learning"]) == {"float32 0", "nf4 0"}
    assert (tmp_path / "quantized_base.md").read_text() in done.out


def test_tables_compare_with_float32():
    answers = {"seed": 0, "seen": [1.0, 1.0], "paraphrase": [1.0, 0.0]}
    losses = {"float32": [2.0, 1.0], "nf4": [2.0, 1.5]}
    cases = {
        f"{base} 0": {"base": base, "losses": of_base, **answers}
        for base, of_base in losses.items()
    }
    cases["nf4 0"]["seen"] = [1.0, 0.0]
    floats, nf4 = learning_table(cases).rows
    assert (floats[-1], nf4[-1].split()[0], nf4[3]) == ("-", "-25.0", "1.750")
    rows = perplexity_table(
        {base: {"nll": [2.0, x], "tokens": [2, 2]} for base, x in (("float32", 2.0), ("int8", 2.4))}
    ).rows
    assert rows[0][1].startswith("2.72") and rows[1][2].startswith(f"{np.exp(0.1):.4f}")


def test_a_base_is_what_its_name_says():
    params = {"layers": {"kernel": np.float32(1 + 2**-12) * np.ones((2, 4, 4), np.float32)}}
    leaves = {base: trees.flatten(stored(params, base))["layers/kernel"] for base in BASES}
    assert np.ptp(leaves["float32"] - params["layers"]["kernel"]) == 0 and np.all(
        leaves["bfloat16"] == 1
    )
    assert (leaves["int8"].format, leaves["nf4"].format) == ("int8", "nf4")


@pytest.mark.multiprocess
def test_an_unknown_base_is_told(benchmark, tmp_path):
    done = benchmark("--bases=nf5", f"--out={tmp_path}")
    assert (done.code, done.out) == (2, "") and "unknown base 'nf5'" in done.err
