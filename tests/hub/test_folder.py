"""Loading folders of safetensors: what transformers writes comes back whole; anything odd is one
line that names it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from oracles import (
    FAMILIES,
    carry_over,
    hf_logits,
    quick_jit,
    random_tokens,
    randomised,
    tiny_hf,
    tiny_hf_bert,
    tiny_hf_gemma,
)

from kafjax import hub
from kafjax.core import trees
from kafjax.core.errors import UserError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def gemma(tmp_path):
    tiny_hf_gemma().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    tiny_hf_gemma().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path


def load_error(folder) -> str:
    with pytest.raises(UserError) as caught:
        hub.load(str(folder))
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message


def edit(path: Path, change):
    """Rewrites a safetensors or a JSON file with its dict as `change` leaves it."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    else:
        content = safetensors.numpy.load_file(path)
        change(content)
        safetensors.numpy.save_file(content, path)


def test_shards_give_the_same_parameters_as_one_file(tmp_path):
    hf = tiny_hf_gemma()
    _, whole = carry_over(hf, tmp_path / "whole")
    _, in_shards = carry_over(hf, tmp_path / "shards", max_shard_size="20KB")
    assert (tmp_path / "shards" / INDEX).exists()
    for (path, a), b in zip(
        trees.flatten(whole).items(), trees.flatten(in_shards).values(), strict=True
    ):
        np.testing.assert_array_equal(a, b, err_msg=path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_files_in_half_precision_load_exactly_as_float32(tmp_path, dtype):
    _, params = carry_over(tiny_hf_gemma(), tmp_path / "float32")
    _, from_half = carry_over(tiny_hf_gemma().to(dtype), tmp_path / "half")
    for (path, ours), exact in zip(
        trees.flatten(from_half).items(), trees.flatten(params).values(), strict=True
    ):
        assert ours.dtype == jnp.float32
        np.testing.assert_array_equal(
            ours, torch.tensor(np.asarray(exact)).to(dtype).float().numpy(), err_msg=path
        )


def test_a_written_out_tied_head_is_no_extra_tensor(gemma):
    expected = hub.load(str(gemma))[1]
    edit(
        gemma / "model.safetensors",
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}),
    )
    np.testing.assert_array_equal(
        hub.load(str(gemma))[1]["embed"]["embedding"], expected["embed"]["embedding"]
    )


def test_the_activations_dtype_is_the_callers_and_parameters_stay_float32(gemma):
    model, params = hub.load(str(gemma), dtype=jnp.bfloat16)
    assert (
        jax.eval_shape(model.hidden, params, jnp.zeros((1, 3), jnp.int32))[0].dtype == jnp.bfloat16
    )
    assert params["embed"]["embedding"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda t: t.update({"model.layers.0.mlp.magic.weight": np.ones(3, np.float32)}),
            r"extra .*layers\.0\.mlp\.magic",
        ),
        (
            lambda t: t.update({"model.layers.4.input_layernorm.weight": np.ones(24, np.float32)}),
            r"extra .*layers\.4\.input",
        ),
        (
            lambda t: t.pop("model.layers.2.mlp.up_proj.weight"),
            r"layers\.2\.mlp\.up_proj\.weight.* missing",
        ),
        (lambda t: t.clear(), r"and \d+ more missing"),
        (
            lambda t: t.update({"model.norm.weight": np.ones(23, np.float32)}),
            r"model\.norm\.weight.*\[23\].*\[24\]",
        ),
        (
            lambda t: t.update(
                {"model.layers.1.mlp.up_proj.weight": np.ones((24, 44), np.float32)}
            ),
            r"layers\.1\.mlp\.up_proj.*\[24, 44\].*\[44, 24\]",
        ),
        (
            lambda t: t["model.layers.3.self_attn.v_proj.weight"].__setitem__((2, 5), np.nan),
            r"layers\.3\.self_attn\.v_proj.*NaN",
        ),
        (
            lambda t: t["model.embed_tokens.weight"].__setitem__((2, 5), np.inf),
            r"embed_tokens.*infinity",
        ),
    ],
    ids=["extra", "extra layer", "missing", "empty", "misshapen", "transposed", "NaN", "infinity"],
)
def test_odd_tensors_are_named(gemma, change, named):
    edit(gemma / "model.safetensors", change)
    assert re.search(named, load_error(gemma))


def test_a_tensor_in_two_shards_is_named(sharded):
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    name, value = next(iter(safetensors.numpy.load_file(first).items()))
    edit(second, lambda t: t.update({name: value}))
    message = load_error(sharded)
    assert name in message and "twice" in message


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_a_truncated_file_is_named(gemma, keep):
    path = gemma / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if keep == 0.5 else keep])
    assert "model.safetensors: damaged or truncated" in load_error(gemma)


@pytest.mark.parametrize(
    ("shard", "said"),
    [
        ("model-00009.safetensors", "missing"),
        ("../model.safetensors", "plain file name"),
        ("/etc/passwd", "plain file name"),
        (7, "valid string"),
    ],
)
def test_an_index_that_names_a_wrong_shard(sharded, shard, said):
    edit(sharded / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": shard}))
    message = load_error(sharded)
    assert str(shard) in message and said in message


@pytest.mark.parametrize(
    "content", ["{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": null}']
)
def test_an_index_without_a_map(sharded, content):
    (sharded / INDEX).write_text(content)
    assert "weight_map" in load_error(sharded)


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_broken_json_is_named_with_its_line(sharded, name):
    (sharded / name).write_text('{\n"model_type": "gemma3_text",\n]')
    assert f"{name}:3" in load_error(sharded)


@pytest.mark.parametrize(
    ("beside", "ends"),
    [
        ({"eos_token_id": [1, 96]}, (1, (96,))),
        ({"eos_token_id": 7}, (7, ())),
        ({"do_sample": True}, (1, ())),
    ],
    ids=str,
)
def test_what_ends_a_reply_may_stand_beside_the_configuration(gemma, beside, ends):
    (gemma / "generation_config.json").write_text(json.dumps(beside))
    config = hub.load(str(gemma))[0].config
    assert (config.eos_id, config.also_eos_ids) == ends


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_json_that_is_no_object_is_named(gemma, name):
    (gemma / name).write_text("[1]")
    assert f"{name}: expected a JSON object, got list" in load_error(gemma)


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("gemma5", "Did you mean 'gemma"),
        ("qwen3_next", "Did you mean 'qwen3"),
        (
            "zzz",
            "Known: bert, gemma2, gemma3, gemma3_text, gemma4, gemma4_text, llama, ministral3, mistral, mistral3",
        ),
        (None, "Known: bert, gemma2"),
        (["llama"], "is not supported"),
    ],
)
def test_another_model_type_is_refused_with_the_nearest_one(gemma, model_type, said):
    edit(gemma / "config.json", lambda config: config.update(model_type=model_type))
    message = load_error(gemma)
    assert str(model_type) in message and said in message


def test_folders_that_are_no_models(tmp_path):
    assert "no config.json" in load_error(tmp_path)
    tiny_hf_gemma().config.save_pretrained(tmp_path)
    assert "no model.safetensors" in load_error(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle, never read")
    assert "no model.safetensors" in load_error(tmp_path)


@pytest.mark.parametrize(
    ("saved", "claimed", "named"),
    [
        ("qwen3", "qwen2", r"extra tensor 'model\.layers\.0\.self_attn\.[kq]_norm\.weight'"),
        ("qwen2", "llama", r"extra tensor 'model\.layers\.0\.self_attn\.[kqv]_proj\.bias'"),
        (
            "llama",
            "qwen3",
            r"tensor 'model\.layers\.0\.self_attn\.q_norm\.weight' and 7 more missing",
        ),
        (
            "gemma3_text",
            "llama",
            r"extra tensor 'model\.layers\.0\.\w+_feedforward_layernorm\.weight'",
        ),
    ],
)
def test_tensors_of_another_family_are_named(tmp_path, saved, claimed, named):
    tiny_hf(saved).save_pretrained(tmp_path)
    config = FAMILIES[claimed][0](
        **FAMILIES[claimed][2], tie_word_embeddings=saved == "gemma3_text"
    ).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert re.search(named, load_error(tmp_path))


def test_a_quantised_tensor_is_named(gemma):
    edit(
        gemma / "model.safetensors", lambda t: t.update({"model.norm.weight": np.ones(24, np.int8)})
    )
    assert "'model.norm.weight' is of type I8" in load_error(gemma)


def test_keys_and_values_of_layers_that_share_them_are_passed_over_in_a_file(tmp_path):
    """Published files hold them, and nothing reads them; of a layer that has some they are
    wanted."""
    tiny_hf("gemma4_text").save_pretrained(tmp_path)
    expected = hub.load(str(tmp_path))[1]
    edit(
        tmp_path / "model.safetensors",
        lambda t: t.update(
            {"model.layers.5.self_attn.k_proj.weight": np.ones((32, 24), np.float32)}
        ),
    )
    jax.tree.map(np.testing.assert_array_equal, hub.load(str(tmp_path))[1], expected)
    edit(tmp_path / "model.safetensors", lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"))
    assert "tensor 'model.layers.1.self_attn.k_proj.weight' missing" in load_error(tmp_path)


VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def multimodal(family: str) -> transformers.PreTrainedModel:
    """A tiny random one, whose text model is of that family."""
    fields = {"image_token_index": 100, "eos_token_id": [1, 96], "attn_implementation": "eager"}
    text = {**FAMILIES[family][2], "vocab_size": 112, "model_type": family}
    if family == "gemma4_text":
        vision = {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        }
        vision |= {"head_dim": 8, "patch_size": 4, "position_embedding_size": 16}
        text |= {
            "vocab_size_per_layer_input": 112,
            "pad_token_id": 0,
            "use_bidirectional_attention": "vision",
        }
        config = transformers.Gemma4Config(
            text_config=text, vision_config=vision, image_token_id=100, eos_token_id=[1, 96]
        )
        return randomised(transformers.Gemma4ForConditionalGeneration(config), 0)
    if family == "gemma3_text":
        text["pad_token_id"] = 0
        fields |= {"boi_token_index": 101, "eoi_token_index": 102, "mm_tokens_per_image": 4}
        config = transformers.Gemma3Config(text_config=text, vision_config=VISION, **fields)
        return randomised(transformers.Gemma3ForConditionalGeneration(config), 0)
    config = transformers.Mistral3Config(
        text_config=text, vision_config={**VISION, "model_type": "pixtral", "head_dim": 8}, **fields
    )
    return randomised(transformers.Mistral3ForConditionalGeneration(config), 0)


@pytest.mark.parametrize(
    "in_memory", [False, True], ids=["names of published files", "names in memory"]
)
@pytest.mark.parametrize("family", ["gemma4_text", "gemma3_text", "ministral3", "mistral"])
def test_the_text_of_a_multimodal_model_computes_as_transformers(tmp_path, family, in_memory):
    """The vision tower is passed over, under the names that transformers writes and under those
    that it computes with."""
    hf = multimodal(family)
    hf.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    if in_memory:
        new = {
            "language_model.model.": "model.language_model.",
            "vision_tower.": "model.vision_tower.",
            "multi": "model.multi",
        }

        def rename(name):
            return next(
                (
                    ours + name.removeprefix(theirs)
                    for theirs, ours in new.items()
                    if name.startswith(theirs)
                ),
                name,
            )

        tensors = {
            rename(name): tensor for name, tensor in safetensors.numpy.load_file(weights).items()
        }
        assert tensors.keys() <= hf.state_dict().keys()
        safetensors.numpy.save_file(tensors, weights)
    assert any("vision_tower" in name for name in safetensors.numpy.load_file(weights))
    model, params = hub.load(str(tmp_path))
    assert (model.config.family, model.config.vocab_size, model.config.also_eos_ids) == (
        family,
        112,
        (96,),
    )
    tokens = random_tokens(0, (2, 12), 100)
    np.testing.assert_allclose(
        quick_jit(model.apply)(params, tokens), hf_logits(hf, tokens), rtol=2e-5, atol=2e-5
    )


def test_an_unknown_name_gets_the_nearest():
    for call in (hub.load, hub.tokenizer):
        with pytest.raises(UserError, match=r"no model 'gemma3-27m'.*Did you mean 'gemma3-270m'"):
            call("gemma3-27m")
        with pytest.raises(UserError, match="Known: gemma3-270m, minilm"):
            call("zzz")


def test_a_bert_folder_with_its_tokenizer(tmp_path):
    carry_over(tiny_hf_bert(), tmp_path)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        hub.tokenizer(str(tmp_path))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    hf = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    hf.save_pretrained(tmp_path)
    ours = hub.tokenizer(str(tmp_path))
    assert (
        ours.encode("One twos three").ids == hf("One twos three")["input_ids"] == [2, 5, 6, 7, 1, 3]
    )
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json.*damaged"):
        hub.tokenizer(str(tmp_path))


def test_a_user_without_a_home_is_told_where_weights_can_go(monkeypatch, tmp_path):
    def no_home() -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("KAFJAX_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(UserError, match="this user has no home folder; set KAFJAX_CACHE"):
        hub.cache_dir()
    monkeypatch.setenv("KAFJAX_CACHE", str(tmp_path))
    assert hub.cache_dir() == tmp_path
