"""Weights that a folder holds twice, or as its configuration does not say: what transformers
computes with them is computed here."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from oracles import hf_logits, quick_jit, random_tokens, tiny_hf

from kafjax import hub
from kafjax.core.errors import UserError
from kafjax.models import Decoder

TOKENS = random_tokens(0, (2, 9), 101)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def written(folder, family: str, change) -> None:
    """A tied model of transformers whose file `change` has changed."""
    tiny_hf(family, tie_word_embeddings=True).save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})


def same_as_transformers(folder) -> Decoder:
    model, params = hub.load(str(folder))
    expected = hf_logits(
        transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager"
        ).eval(),
        TOKENS,
    )
    np.testing.assert_allclose(
        quick_jit(model.apply)(params, TOKENS), expected, atol=1e-5, rtol=1e-5
    )
    return model


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3"])
@pytest.mark.parametrize(
    ("change", "tied"),
    [
        (lambda t: t.update({HEAD: t[EMBEDDING].clone()}), True),
        (
            lambda t: t.update({HEAD: t[EMBEDDING] + 0.01 * (torch.arange(101) == 100)[:, None]}),
            False,
        ),
        (lambda t: t.update({HEAD: t[EMBEDDING].half()}), False),
        (lambda t: t.update({HEAD: t.pop(EMBEDDING)}), True),
    ],
    ids=["equal", "another last row", "rounded", "the head alone"],
)
def test_a_head_beside_a_configuration_that_ties_it(tmp_path, family, change, tied):
    written(tmp_path, family, change)
    assert (
        same_as_transformers(tmp_path).config.tied
        == hub.describe(str(tmp_path)).config.tied
        == tied
    )


def test_a_head_of_its_own_is_found_in_another_shard_and_is_saved(tmp_path):
    whole, shards, again = (tmp_path / name for name in ("whole", "shards", "again"))
    written(whole, "qwen3", lambda t: t.update({HEAD: t[EMBEDDING] + 1}))
    tensors = safetensors.torch.load_file(whole / "model.safetensors")
    shards.mkdir()
    shutil.copy(whole / "config.json", shards)
    half = {name: f"model-0000{1 + (name == HEAD)}-of-00002.safetensors" for name in tensors}
    for file in set(half.values()):
        safetensors.torch.save_file(
            {name: t for name, t in tensors.items() if half[name] == file},
            shards / file,
            {"format": "pt"},
        )
    (shards / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": half})
    )
    same_as_transformers(shards)
    hub.save(again, *hub.load(str(shards)))
    assert json.loads((again / "config.json").read_text())["tie_word_embeddings"] is False
    assert not same_as_transformers(again).config.tied


def test_a_head_of_another_shape_is_named(tmp_path):
    written(tmp_path, "qwen3", lambda t: t.update({HEAD: torch.ones(100, 24)}))
    with pytest.raises(
        UserError,
        match=r"'lm_head\.weight' has shape \[100, 24\], config\.json asks for \[101, 24\]",
    ):
        hub.load(str(tmp_path))


@pytest.mark.parametrize("shards_are_there", [True, False])
def test_a_single_file_is_read_and_not_the_index_beside_it(tmp_path, shards_are_there):
    tiny_hf("llama", seed=5).save_pretrained(tmp_path, max_shard_size="20kB")
    tiny_hf("llama", seed=6).save_pretrained(tmp_path / "newer")
    shutil.copy(tmp_path / "newer" / "model.safetensors", tmp_path)
    if not shards_are_there:
        for shard in tmp_path.glob("model-*"):
            shard.unlink()
    same_as_transformers(tmp_path)


def test_weights_under_a_name_that_only_the_configuration_knows_are_refused(tmp_path):
    tiny_hf("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "transformers_weights": "other.safetensors"})
    )
    with pytest.raises(UserError, match="transformers_weights is not supported; name that file"):
        hub.load(str(tmp_path))
