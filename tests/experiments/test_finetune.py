from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import tiny

from kafjax import hub, lora
from kafjax.core import trees

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A tiny model and a tiny corpus."""
    folder = tmp_path_factory.mktemp("finetune")
    tiny.write_gemma(folder / "model")
    tiny.write_corpus(folder / "corpus")
    return folder


def finetune(here: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.finetune", "--model=model", "--corpus=corpus", "--seq_len=64", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.multiprocess
@pytest.mark.parametrize(("method", "rate"), [("lora", "1e-2"), ("full", "3e-3")])
def test_trains_saves_shows_and_is_not_run_again(here, method, rate):
    arguments = (f"--method={method}", "--rank=4", f"--lr={rate}", "--epochs=3", "--batch_rows=2", f"--name={method}", "--wandb")
    done = finetune(here, *arguments)
    assert done.returncode == 0, done.stderr
    assert "experiments.answer --run=runs/" in done.stdout and done.stdout.count("model:") == 3
    run = here / "runs" / method
    config = json.loads((run / "config.json").read_text())
    assert (config["method"], config["lr"]) == (method, float(rate)) and config["corpus_hash"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((run / "result.json").read_text())
    assert [row["step"] for row in rows] == list(range(1, result["steps"] + 1))
    assert rows[-1]["loss"] == result["final_loss"] < rows[0]["loss"]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "wandb").glob("offline-run-*")) and not (run / "checkpoints").exists()

    _, params = hub.load(str(here / "model"))
    if method == "lora":
        adapters, spec = lora.load(run / "adapter.safetensors", params)
        assert spec.rank == 4 and all(np.any(pair["b"]) for pair in adapters.values())
    else:
        before, trained = trees.flatten(params), safetensors.numpy.load_file(run / "weights.safetensors")
        assert set(trained) == set(before) - {"embed/embedding"}
        assert not any(np.array_equal(trained[path], before[path]) for path in trained)

    again = finetune(here, *arguments)
    assert again.returncode == 0 and "finished earlier" in again.stderr
    assert len((run / "metrics.jsonl").read_text().splitlines()) == len(rows)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--mesh=data:3"], "there are 1"),
        (["--targets=nothing"], "match no kernel"),
        (["--rank=99"], "rank=99 is above"),
        (["--batch_rows=3", "--accumulate=2"], "multiple of 2"),
        (["--lr=0"], "learning_rate=0.0: must be above 0"),
        (["--replay=1"], "replay=1.0"),
        (["--method=loar"], "loar"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(here, arguments, told):
    done = finetune(here, "--name=bad", *arguments)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("model: ")]
    assert line.startswith("error: ") and told in line
    assert not (here / "runs" / "bad").exists()
