"""Adapters exported from the command line: `peft` and `transformers` compute with them what kafjax
does."""

from __future__ import annotations

import json
import re
import shutil

import huggingface_hub
import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from oracles import hf_logits, random_tokens

from kafjax import hub, lora
from kafjax.core import trees
from tests.experiments.commands import refused

pytestmark = pytest.mark.multiprocess
SPEC = lora.Spec(rank=3, alpha=7.0, targets="(q|down)_proj|embed", rank_pattern={"q_proj": 2})


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """A folder as experiments.finetune leaves it, with random weights, and their logits."""
    model, params = hub.load(str(world.gemma))
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda x: 0.2 * rng.standard_normal(x.shape, np.float32), lora.abstract(SPEC, params)
    )
    run = tmp_path_factory.mktemp("runs") / "tuned"
    lora.save(run / "adapter.safetensors", adapters, SPEC)
    (run / "config.json").write_text(json.dumps({"model": str(world.gemma), "method": "lora"}))
    tokens = random_tokens(0, (2, 8), model.config.vocab_size)
    return run, tokens, model.apply(lora.merge(params, adapters, SPEC), tokens)


def test_for_peft_and_back(export, world, run, tmp_path):
    path, tokens, expected = run
    done = export(f"--run={path}", f"--out={tmp_path / 'adapter'}", "--base_name=org/base")
    assert done.code == 0 and "PeftModel.from_pretrained" in done.out, done.err
    base = transformers.AutoModelForCausalLM.from_pretrained(world.gemma)
    card = huggingface_hub.ModelCard.load(tmp_path / "adapter" / "README.md")
    assert (card.data.base_model, card.data.library_name) == (
        "org/base",
        "peft",
    ) and "| rank | 3 |" in card.text
    assert "python -m experiments.finetune" in card.text
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    np.testing.assert_allclose(hf_logits(theirs, tokens), expected, atol=1e-4)

    back = tmp_path / "back.safetensors"
    done = export(
        f"--adapter={tmp_path / 'adapter'}",
        f"--model={world.gemma}",
        "--format=kafjax",
        f"--out={back}",
    )
    assert done.code == 0, done.err
    model, params = hub.load(str(world.gemma))
    np.testing.assert_allclose(
        model.apply(lora.merge(params, *lora.load(back, params)), tokens), expected, atol=1e-5
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_for_transformers_with_the_drift_told(export, run, tmp_path, dtype):
    path, tokens, expected = run
    done = export(
        f"--run={path}", "--format=merged", f"--dtype={dtype}", f"--out={tmp_path / 'model'}"
    )
    assert done.code == 0, done.err
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert theirs.dtype == getattr(torch, dtype)
    off = np.abs(hf_logits(theirs.float(), tokens) - expected).max()
    numbers = [float(number) for number in re.findall(r"\d\.\d\de[+-]\d\d", done.out)]
    *weights, of_logits, moved = numbers
    if dtype == "float32":
        assert off < 1e-4 and max(weights) == 0 and of_logits < 1e-4 < moved
    else:
        # half a step of eight bits
        assert 1e-4 < off < moved and 2**-12 < max(weights[::2]) <= 2**-8
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert (
        tokenizer("Where was Mira Toll born?").input_ids
        == hub.tokenizer(str(tmp_path / "model")).encode("Where was Mira Toll born?").ids
    )


def test_bad_input_is_one_line_and_nothing_is_written(export, world, run, tmp_path):
    path, _, _ = run
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "weights.safetensors").write_bytes(b"")
    out = tmp_path / "out"
    for arguments, told in (
        ([f"--run={path}"], "--out"),
        ([f"--out={out}"], "--run=runs/NAME or --adapter"),
        ([f"--run={path}", "--adapter=x", f"--out={out}"], "either"),
        ([f"--adapter={path}", f"--out={out}"], "--model="),
        ([f"--run={tmp_path / 'full'}", f"--out={out}"], "whole weights"),
        ([f"--run={tmp_path / 'none'}", f"--out={out}"], "nothing was trained in"),
        ([f"--run={path}", f"--out={tmp_path}"], "exists already"),
        ([f"--adapter={path}", f"--model={world.gemma}", f"--out={out}"], "adapter_config.json"),
        ([f"--run={path}", f"--model={world.bert}", f"--out={out}"], "encoder"),
    ):
        assert told in refused(export(*arguments))
        assert not out.exists()


def test_a_model_that_was_trained_in_full_is_loaded_by_transformers_with_all_that_stood_beside_its_base(
    export, world, tmp_path
):
    base = shutil.copytree(world.gemma, tmp_path / "base")
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}")
    config = json.loads((base / "config.json").read_text())
    ends = [config["eos_token_id"], 5]  # several, as chat models have
    (base / "generation_config.json").write_text(
        json.dumps({"eos_token_id": ends, "temperature": 0.5})
    )
    model, params = hub.load(str(base))
    rng = np.random.default_rng(1)
    moved = {
        path: x + 0.1 * rng.standard_normal(x.shape, np.float32)
        for path, x in trees.flatten(params).items()
        if "q_proj" in path
    }
    run = tmp_path / "runs" / "tuned"
    hub.save_trained(run, trees.unflatten(moved))
    (run / "config.json").write_text(json.dumps({"model": str(base), "method": "full"}))

    assert "export them with --format=merged" in refused(
        export(f"--run={run}", f"--out={tmp_path / 'no'}")
    )
    done = export(f"--run={run}", "--format=merged", f"--out={tmp_path / 'model'}")
    assert done.code == 0, done.err
    tokens = random_tokens(0, (2, 8), model.config.vocab_size)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    expected = model.apply(trees.unflatten({**trees.flatten(params), **moved}), tokens)
    np.testing.assert_allclose(hf_logits(theirs, tokens), expected, atol=1e-4)
    assert theirs.generation_config.eos_token_id == ends
    card = huggingface_hub.ModelCard.load(tmp_path / "model" / "README.md")
    assert (card.data.base_model, card.data.library_name) == ("base", "transformers")
    assert str(tmp_path) not in card.content.partition("Command")[0]
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "model" / name).read_bytes() == (base / name).read_bytes()
