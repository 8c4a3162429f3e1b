"""`hub.save` writes a folder of the family: transformers loads it, `hub.load` returns the same
bits, and a kill leaves none."""

from __future__ import annotations

import dataclasses
import itertools
import json
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from oracles import FAMILIES, carry_over, hf_logits, quick_jit, random_tokens, tiny_hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from kafjax import hub, lora
from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.models import CONFIGS, Decoder, DecoderConfig
from tests import compiling

ROOT = Path(__file__).parents[2]
INDEX = "model.safetensors.index.json"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 0.25,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 12,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 12,
    "rope_theta": 100.0,
    "beta_fast": 1.0,
}
YARN |= {"beta_slow": 0.1, "mscale": 2.0, "mscale_all_dim": 0.5}
# Of each family what the others do not have, so that nothing that has to be written is at its
# default.
OVERRIDES = {
    "gemma3_text": {"attention_bias": True},
    "gemma4_text": {
        **{
            "attention_bias": True,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "final_logit_softcapping": 9.0,
        },
        **{
            "vocab_size_per_layer_input": 105,
            "use_double_wide_mlp": False,
            "num_kv_shared_layers": 3,
        },
    },
    "gemma2": {
        "attention_bias": True,
        "final_logit_softcapping": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 77.0},
    },
    "llama": {"attention_bias": True, "rope_parameters": {**LLAMA3, "rope_theta": 100.0}},
    "mistral": {"sliding_window": 3, "head_dim": 16},
    "ministral3": {"sliding_window": 3, "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.3}},
    "phi3": {"sliding_window": 3},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 3,
        "max_window_layers": 2,
        "num_key_value_heads": 1,
    },
    "qwen3": {"attention_bias": True, "head_dim": 4, "eos_token_id": [1, 7]},
    "qwen3_moe": {
        "attention_bias": True,
        "norm_topk_prob": True,
        "use_sliding_window": True,
        "sliding_window": 3,
    },
    "mixtral": {"num_experts_per_tok": 3, "sliding_window": 3},
    "smollm3": {
        "attention_bias": True,
        "no_rope_layers": [0, 0, 1, 1],
        "use_sliding_window": True,
        "sliding_window": 3,
    },
    "olmo2": {"attention_bias": True, "rope_parameters": YARN},
    "olmo3": {
        "sliding_window": 3,
        "rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_theta": 50.0}},
    },
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_the_same_from_what_was_saved(family, tied, tmp_path):
    tiny_hf(family, tie_word_embeddings=tied, **OVERRIDES[family]).to(
        torch.bfloat16
    ).save_pretrained(tmp_path / "theirs")
    model, params = hub.load(str(tmp_path / "theirs"), param_dtype=jnp.bfloat16)
    hub.save(tmp_path / "ours", model, params, shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    load = transformers.AutoModelForCausalLM.from_pretrained
    hf, again = (
        load(tmp_path / whose, dtype="auto", attn_implementation="eager")
        for whose in ("theirs", "ours")
    )
    assert type(again) is FAMILIES[family][1] and again.dtype == torch.bfloat16
    for (name, theirs), (_, ours) in zip(
        hf.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert torch.equal(theirs, ours), name  # bit by bit
    tokens = random_tokens(1, (2, 16), 101)
    np.testing.assert_array_equal(hf_logits(again, tokens), hf_logits(hf, tokens))
    assert again.generation_config.eos_token_id == hf.generation_config.eos_token_id
    assert (
        DecoderConfig.from_hf(json.loads((tmp_path / "ours" / "config.json").read_text()))
        == model.config
    )


def test_shards_are_as_large_as_asked_and_the_index_says_where_everything_is(tmp_path):
    model, params = carry_over(tiny_hf("llama"), tmp_path / "theirs")
    hub.save(tmp_path / "ours", model, params, shard_bytes=20_000)
    index = json.loads((tmp_path / "ours" / INDEX).read_text())
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    n = len(files)
    assert [file.name for file in files] == [
        f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)
    ]
    held = {name: file.name for file in files for name in safetensors.numpy.load_file(file)}
    assert held == index["weight_map"]
    sizes = [
        sum(tensor.nbytes for tensor in safetensors.numpy.load_file(file).values())
        for file in files
    ]
    assert max(sizes) <= 20_000 and sum(sizes) == index["metadata"][
        "total_size"
    ] == 4 * trees.count(params)
    # no more of them than needed, in this order
    assert all(a + b > 20_000 for a, b in itertools.pairwise(sizes))


@pytest.fixture
def small() -> tuple[Decoder, trees.Tree]:
    sizes = {
        "vocab_size": 258,
        "hidden_size": 16,
        "mlp_size": 24,
        "n_layers": 2,
        "n_heads": 2,
        "n_kv_heads": 1,
        "head_dim": 8,
    }
    changes = {"sliding": (False, False), "attention_scale": 8**-0.5, "bos_id": None, "eos_id": 1}
    model = Decoder(dataclasses.replace(CONFIGS["qwen3-0.6b"], **sizes, **changes))
    return model, quick_jit(model.init)(jax.random.key(0))


def byte_level() -> Tokenizer:
    """A tokenizer like Llama's and Qwen's: pieces are bytes, a template may put a token in
    front."""
    pieces = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


@pytest.mark.parametrize("bos", [True, False])
def test_the_tokenizer_is_written_for_transformers_too(small, bos, tmp_path):
    model, params = small
    tokenizer = byte_level()
    if bos:
        model = dataclasses.replace(model, config=dataclasses.replace(model.config, bos_id=0))
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    hub.save(tmp_path / "ours", model, params, tokenizer=tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    text = "Straße 日本\n 12"
    ids = hub.tokenizer(str(tmp_path / "ours")).encode(text).ids
    assert theirs(text)["input_ids"] == ids == tokenizer.encode(text).ids and (ids[0] == 0) is bos
    assert theirs.decode(ids, skip_special_tokens=True) == text
    assert (theirs.bos_token, theirs.eos_token) == ("<s>" if bos else None, "</s>")


def test_a_folders_tokenizer_is_copied_with_its_chat_template(small, tmp_path):
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="</s>")
    theirs.chat_template = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}"
    theirs.save_pretrained(tmp_path / "base")
    hub.save(tmp_path / "tuned", *small, tokenizer=tmp_path / "base")
    copied = transformers.AutoTokenizer.from_pretrained(tmp_path / "tuned")
    messages = [{"role": "user", "content": "Who?"}]
    assert copied.apply_chat_template(messages) == theirs.apply_chat_template(messages)
    assert hub.load(str(tmp_path / "tuned"))[0].config == small[0].config
    with pytest.raises(UserError, match=r"nothing: no tokenizer\.json"):
        hub.save(tmp_path / "again", *small, tokenizer=tmp_path / "nothing")
    assert not (tmp_path / "again").exists()


def test_a_folder_that_is_taken_is_left_as_it_is(small, tmp_path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        hub.save(tmp_path, *small)
    with pytest.raises(UserError, match="exists already"):
        hub.save(tmp_path / "kept", *small)
    assert [file.name for file in tmp_path.iterdir()] == ["kept"] and (
        tmp_path / "kept"
    ).read_text() == "mine"
    (tmp_path / "empty").mkdir()
    hub.save(tmp_path / "empty", *small)
    assert (tmp_path / "empty" / "config.json").exists()


def test_what_cannot_be_saved_is_told_and_leaves_nothing(small, tmp_path):
    model, params = small
    adapters = lora.init(lora.Spec(rank=2), params, jax.random.key(0))
    without_norm = {name: part for name, part in params.items() if name != "final_norm"}
    larger = Decoder(dataclasses.replace(model.config, mlp_size=32))
    other = Decoder(dataclasses.replace(model.config, qk_norm=False))
    for told, bad_model, bad_params in (
        (
            "carries an adapter; merge it first",
            model,
            lora.attach(params, adapters, lora.Spec(rank=2)),
        ),
        ("'final_norm/scale' is missing", model, without_norm),
        (r"has shape \[2, 24, 16\], not \[2, 32, 16\]", larger, params),
        ("'layers/attn/k_norm/scale' is no part of the model", other, params),
    ):
        with pytest.raises(UserError, match=told):
            hub.save(tmp_path / "new", bad_model, bad_params)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file"):
        hub.save(tmp_path / "file" / "new", model, params)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


KILLED = """
import itertools, os, signal, sys
import jax.numpy as jnp
from kafjax import hub
from kafjax.hub import safetensors_out
model, params = hub.load(sys.argv[1])
write = safetensors_out.safetensors.numpy.save_file
files = itertools.count(1)
def killed_at_the_third(*arguments, **options):
    write(*arguments, **options)
    if next(files) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
safetensors_out.safetensors.numpy.save_file = killed_at_the_third
hub.save(sys.argv[2], model, params, shard_bytes=20_000)
"""


@pytest.mark.multiprocess
def test_a_kill_in_the_middle_leaves_no_folder_and_the_next_save_is_whole(tmp_path):
    model, params = carry_over(tiny_hf("qwen2"), tmp_path / "theirs")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "theirs"), str(tmp_path / "ours")]
    done = subprocess.run(
        command, env=compiling.environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "ours").exists()
    hub.save(tmp_path / "ours", model, params)
    for path, leaf in trees.flatten(hub.load(str(tmp_path / "ours"))[1]).items():
        np.testing.assert_array_equal(leaf, trees.flatten(params)[path])
