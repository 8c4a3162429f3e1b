"""Fine-tuning from the command line: what it writes, and that it does not run twice."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

from kafjax import hub, lora
from kafjax.core import trees
from tests import tiny
from tests.experiments.commands import refused

SETTINGS = ("--rank=4", "--epochs=3", "--batch_rows=2", "--seq_len=64")
VARIANTS = (
    *(
        "--init=pissa",
        "--dora",
        "--rslora",
        "--dropout=0.1",
        "--lora_plus=2",
        "--train_also=final_norm",
        "--layers=0,1",
    ),
    *("--rank_pattern=q_proj:2", "--rank_pattern=mlp:3", "--alpha_pattern=mlp:5"),
)


@pytest.mark.multiprocess
@pytest.mark.parametrize(("method", "rate"), [("lora", "1e-2"), ("full", "3e-3")])
def test_trains_saves_shows_and_is_not_run_again(finetune, world, tmp_path, method, rate):
    own = (*SETTINGS, *(VARIANTS if method == "lora" else ()), f"--method={method}", f"--lr={rate}")
    arguments = (
        *world.flags(runs=tmp_path, embedder=None),
        *own,
        "--name=tuned",
        "--wandb=offline",
    )
    done = finetune(*arguments)
    assert done.code == 0, done.err
    run = tmp_path / "tuned"
    assert f"experiments.answer --run={run}" in done.out and done.out.count("model:") == 3
    config = json.loads((run / "config.json").read_text())
    assert (config["method"], config["lr"]) == (method, float(rate)) and config["corpus_hash"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((run / "result.json").read_text())
    assert [row["step"] for row in rows] == list(range(1, result["steps"] + 1))
    assert rows[-1]["loss"] == result["final_loss"] < rows[0]["loss"]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "wandb").glob("offline-run-*")) and not (run / "checkpoints").exists()

    _, params = hub.load(str(world.gemma))
    if method == "lora":
        adapters, spec = lora.load(run / "adapter.safetensors", params)
        assert (spec.init, spec.dora, spec.rslora, spec.layers) == (
            "lora",
            True,
            True,
            (0, 1),
        ) and config["lora_plus"] == 2
        # of PiSSA an adapter of twice the rank is kept
        assert (spec.rank, spec.rank_pattern) == (8, {"q_proj": 4, "mlp": 6})
        assert not np.array_equal(
            adapters.pop("final_norm/scale")["scale"], params["final_norm"]["scale"]
        )
        assert all(np.any(parts["b"]) and np.any(parts["magnitude"]) for parts in adapters.values())
    else:
        before, trained = (
            trees.flatten(params),
            safetensors.numpy.load_file(run / "weights.safetensors"),
        )
        assert set(trained) == set(before) - {"embed/embedding"}
        assert not any(np.array_equal(trained[path], before[path]) for path in trained)

    again = finetune(*arguments)
    assert again.code == 0 and "finished earlier" in again.err
    assert len((run / "metrics.jsonl").read_text().splitlines()) == len(rows)


@pytest.mark.multiprocess
def test_a_quantised_base_is_another_run_and_answers_as_it_was_trained(
    finetune, answer, world, tmp_path
):
    arguments = (*world.flags(runs=tmp_path, embedder=None), *SETTINGS, "--base=nf4", "--lr=1e-2")
    done = finetune(*arguments, "--name=tuned")
    assert done.code == 0, done.err
    assert "base" in refused(finetune(*arguments, "--base=int8", "--name=tuned"))
    assert json.loads((tmp_path / "tuned" / "config.json").read_text())["base"] == "nf4"
    asked = answer(
        f"--run={tmp_path / 'tuned'}",
        f"--embedder={world.bert}",
        "--method=lora",
        "--question=Where was Mira Toll born?",
    )
    assert asked.code == 0, asked.err
    assert "base" in refused(
        answer(
            f"--run={tmp_path / 'tuned'}",
            f"--embedder={world.bert}",
            "--base=int8",
            "--question=Where?",
        )
    )


@pytest.mark.multiprocess
def test_packed_rows_are_all_that_training_needs(finetune, pack_rows, world, tmp_path):
    for package in ("array_record", "grain"):
        pytest.importorskip(package, reason=f"{package} is not installed (extra [data])")
    corpus, rows = tmp_path / "corpus", tmp_path / "rows"
    shutil.copytree(world.corpus, corpus)
    packed = pack_rows(
        f"--corpus={corpus}", f"--model={world.gemma}", "--seq_len=64", f"--out={rows}"
    )
    assert packed.code == 0, packed.err
    following = packed.out.partition("Next: ")[2].split()
    assert following[:3] == ["python", "-m", "experiments.finetune"]
    assert {f"--rows={rows}", "--seq_len=64", f"--model={world.gemma}"} == set(following[3:])
    shutil.rmtree(corpus)  # which may not fit into the memory of those who train

    arguments = [
        f"--model={world.gemma}",
        f"--rows={rows}",
        f"--runs={tmp_path / 'runs'}",
        "--name=tuned",
        *SETTINGS,
    ]
    done = finetune(*arguments)
    assert done.code == 0, done.err
    asked = {
        question["question"]
        for question in tiny.questions()
        if question["split"] in ("seen", "paraphrase", "untrained")
    }
    assert done.out.count("model:") == 3 and sum(question in done.out for question in asked) >= 3
    assert "corpus: " in done.err and "rows of 64 tokens" in done.err
    again = finetune(*arguments)
    assert again.code == 0 and "finished earlier" in again.err

    shutil.rmtree(rows)
    tiny.write_corpus(corpus, corpus=tiny.documents()[1:], questions=tiny.questions()[5:-4])
    assert (
        pack_rows(
            f"--corpus={corpus}", f"--model={world.gemma}", "--seq_len=64", f"--out={rows}"
        ).code
        == 0
    )
    assert "holds a run with corpus_hash=" in refused(finetune(*arguments))
    assert "--replay does not go with --rows" in refused(finetune(*arguments, "--replay=0.5"))


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--mesh=data:3"], "there are 1"),
        (["--targets=q_porj"], "match no kernel; nearest: layers/attn/q_proj/kernel"),
        (["--rank=99"], "rank=99 is above"),
        (["--rank_pattern=q_proj"], "'q_proj' is no number; write REGEX:NUMBER"),
        (["--layers=0,x"], "'x' is no number"),
        (["--dropout=1"], "dropout=1.0"),
        (["--train_also=q_proj"], "choose one"),
        (["--batch_rows=3", "--accumulate=2"], "multiple of 2"),
        (["--lr=0"], "lr=0.0: must be above 0"),
        (["--replay=1"], "replay=1.0"),
        (["--method=loar"], "loar"),
        (["--method=full", "--base=nf4"], "--base=nf4 stores as integers"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(finetune, world, tmp_path, arguments, told):
    runs = tmp_path / "runs"
    assert told in refused(finetune(*world.flags(runs=runs, embedder=None), *SETTINGS, *arguments))
    assert not runs.exists()


@pytest.mark.multiprocess
def test_wandb_that_is_not_installed_is_told(finetune, world, tmp_path):
    outcome = finetune(
        *world.flags(runs=tmp_path / "runs", embedder=None),
        *SETTINGS,
        "--wandb=offline",
        hidden=("wandb",),
    )
    assert "pip install wandb" in refused(outcome)
