"""Kinds of adapters that people have, made by the real `peft` and read here to its logits, or
refused in a line that names the thing."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers
from oracles import (
    TINY_GEMMA,
    carry_over,
    hf_logits,
    quick_jit,
    random_tokens,
    randomised,
    tiny_hf,
    tiny_hf_bert,
)

from kafjax import hub, lora
from kafjax.core.errors import UserError

TOKENS = random_tokens(0, (2, 9), 96)


def tiny_multimodal() -> transformers.PreTrainedModel:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    vision |= {"image_size": 8, "patch_size": 4}
    text = {**TINY_GEMMA, "vocab_size": 112, "pad_token_id": 0}
    ids = {
        "image_token_index": 100,
        "boi_token_index": 101,
        "eoi_token_index": 102,
        "mm_tokens_per_image": 4,
        "eos_token_id": [1, 96],
    }
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, **ids, attn_implementation="eager"
    )
    return randomised(transformers.Gemma3ForConditionalGeneration(config), 0)


BASES = {
    "tied": lambda: tiny_hf("qwen3", tie_word_embeddings=True),
    "untied": lambda: tiny_hf("qwen3"),
    "biased": lambda: tiny_hf("qwen2"),
    "multimodal": tiny_multimodal,
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """`bases(kind)`: folder, model and parameters of a base, and its compiled logits."""

    @functools.cache
    def base(kind: str):
        folder = tmp_path_factory.mktemp(kind)
        model, params = carry_over(BASES[kind](), folder)
        return folder, model, params, quick_jit(model.apply)

    return base


def make(
    hf: transformers.PreTrainedModel, folder: Path, *, save: dict | None = None, **config
) -> peft.PeftModel:
    """Has `peft` make an adapter with everything random that it trains, and save it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            hf, peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 3, **config})
        ).eval()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for _, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder, **(save or {}))
    return model


def read_there(hf: transformers.PreTrainedModel, folder: Path) -> peft.PeftModel:
    """Loads a folder with `peft`; a module or a tensor that it does not find is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected) adapter keys.*")
        return peft.PeftModel.from_pretrained(hf, folder).eval()


def read_here(base: tuple, folder: Path) -> tuple[np.ndarray, lora.Adapters, lora.Spec]:
    """The logits attached, which are those merged."""
    _, model, params, apply = base
    adapters, spec = hub.load_peft(folder, model, params)
    attached = np.asarray(apply(lora.attach(params, adapters, spec), TOKENS))
    same(apply(lora.merge(params, adapters, spec), TOKENS), attached)
    return attached, adapters, spec


def same(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Logits to 1e-5 of the largest."""
    np.testing.assert_allclose(
        ours, theirs, rtol=0, atol=1e-5 * max(1.0, float(np.abs(theirs).max()))
    )


def refused(base: tuple, folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        hub.load_peft(folder, *base[1:3])
    message = str(caught.value)
    assert str(folder) in message and "\n" not in message
    return message


def rewrite(folder: Path, tensors=lambda t: t, **config) -> None:
    file, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    safetensors.numpy.save_file(tensors(safetensors.numpy.load_file(file)), file, {"format": "pt"})
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **config}))


READ = {
    "rank above the kernel": ("biased", dict(r=20, target_modules=["q_proj", "k_proj", "v_proj"])),
    "rank above the kernel, dora": (
        "biased",
        dict(r=20, target_modules=["q_proj", "k_proj"], use_dora=True),
    ),
    "pissa of nearly all ranks": (
        "biased",
        dict(r=16, target_modules=["k_proj"], init_lora_weights="pissa"),
    ),
    "rank above the embedding": ("untied", dict(r=30, target_modules=["embed_tokens", "lm_head"])),
    "eva": ("untied", dict(target_modules=["q_proj"], init_lora_weights="eva")),
    "mica": ("untied", dict(target_modules=["q_proj"], init_lora_weights="mica")),
    "velora": ("untied", dict(target_modules=["q_proj"], velora_config={"num_groups": 4})),
    "as for gpt-2": ("untied", dict(target_modules=["q_proj", "up_proj"], fan_in_fan_out=True)),
    "all biases": ("biased", dict(target_modules=["q_proj", "up_proj"], bias="all")),
    "biases of targets": ("biased", dict(target_modules=["q_proj", "v_proj"], bias="lora_only")),
    "all biases of a model without": ("untied", dict(target_modules=["q_proj"], bias="all")),
    "some layers in full": (
        "biased",
        dict(
            target_modules=["q_proj"],
            modules_to_save=[
                "layers.1.input_layernorm",
                "layers.2.mlp.up_proj",
                "layers.0.self_attn.k_proj",
            ],
        ),
    ),
    "both tables in full": (
        "untied",
        dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    ),
    "tied head": ("tied", dict(target_modules=["lm_head"], ensure_weight_tying=True)),
    "tied embedding and head": (
        "tied",
        dict(target_modules=["embed_tokens", "lm_head", "q_proj"], ensure_weight_tying=True),
    ),
    "tied head in full": (
        "tied",
        dict(target_modules=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=True),
    ),
    "tied rows": (
        "tied",
        dict(
            target_modules=["q_proj"],
            trainable_token_indices={"embed_tokens": [5, 7], "lm_head": [5, 7]},
        ),
    ),
    "list of names": ("multimodal", dict(target_modules=["q_proj", "k_proj", "v_proj", "fc1"])),
    "all linear": ("multimodal", dict(target_modules="all-linear", use_rslora=True)),
    "expression": (
        "multimodal",
        dict(target_modules=r".*language_model\.layers\.[02]\..*(q|up)_proj"),
    ),
    "embedding": ("multimodal", dict(target_modules=["embed_tokens"], ensure_weight_tying=True)),
    "embedding in full": (
        "multimodal",
        dict(
            target_modules=["o_proj"],
            modules_to_save=["embed_tokens", "norm", "multi_modal_projector"],
            ensure_weight_tying=True,
        ),
    ),
    "rows": ("multimodal", dict(target_modules=["o_proj"], trainable_token_indices=[5, 7])),
}


@pytest.mark.parametrize("case", READ)
def test_read_as_peft_computes_it_and_written_back(bases, tmp_path, case):
    kind, config = READ[case]
    expected = hf_logits(make(BASES[kind](), tmp_path / "theirs", **config), TOKENS)
    logits, adapters, spec = read_here(bases(kind), tmp_path / "theirs")
    same(logits, expected)
    assert np.abs(bases(kind)[3](bases(kind)[2], TOKENS) - expected).max() > 0.01
    hub.save_peft(tmp_path / "ours", adapters, spec, *bases(kind)[1:3])
    same(hf_logits(read_there(BASES[kind](), tmp_path / "ours"), TOKENS), expected)


@pytest.mark.parametrize(
    "config",
    [
        dict(target_modules=["query", "dense"]),  # the pooler's, too, which is not computed here
        dict(target_modules="all-linear"),
        dict(target_modules=["query", "word_embeddings"], bias="all"),
        dict(target_modules=["value"], modules_to_save=["pooler", "LayerNorm"]),
    ],
    ids=["dense", "all linear", "biases", "in full"],
)
def test_an_encoder(tmp_path, config):
    model, params = carry_over(tiny_hf_bert(), tmp_path / "base")
    tokens = random_tokens(0, (2, 9), 67)

    def states(there: torch.nn.Module) -> np.ndarray:
        with torch.no_grad():
            return there(
                torch.tensor(np.asarray(tokens), dtype=torch.long)
            ).last_hidden_state.numpy()

    expected = states(
        make(tiny_hf_bert(), tmp_path / "theirs", task_type="FEATURE_EXTRACTION", **config)
    )
    adapters, spec = hub.load_peft(tmp_path / "theirs", model, params)
    hidden = model.hidden(lora.attach(params, adapters, spec), tokens, np.ones(tokens.shape, bool))
    same(np.asarray(hidden), expected)
    hub.save_peft(tmp_path / "ours", adapters, spec, model, params)
    same(states(read_there(tiny_hf_bert(), tmp_path / "ours")), expected)


def test_an_adapter_for_a_multimodal_base_leaves_its_vision_alone(bases, tmp_path):
    """Short names would mean the vision tower's projections, too."""
    _, model, params, _ = bases("multimodal")
    spec = lora.Spec(
        rank=3,
        targets="(q|k)_proj",
        layers=(1, 3),
        trained="final_norm|v_proj|attn_norm",
        rank_pattern={"layers/3/": 2},
    )
    adapters = lora.init(spec, params, jax.random.key(0))
    hub.save_peft(tmp_path / "a", adapters, spec, model, params)
    there = peft.PeftModel.from_pretrained(tiny_multimodal(), tmp_path / "a")
    assert not any(
        "lora" in name or "modules_to_save" in name
        for name, _ in there.named_modules()
        if "vision" in name
    )
    assert sum(name.endswith("lora_A.default") for name, _ in there.named_modules()) == 4
    back, _ = hub.load_peft(tmp_path / "a", model, params)
    jax.tree.map(np.testing.assert_array_equal, back, adapters)


@pytest.mark.parametrize(
    "theirs", ["model.", "language_model.model."], ids=["of the text model", "of older versions"]
)
def test_other_names_of_the_text_of_a_multimodal_model(bases, tmp_path, theirs):
    expected = hf_logits(
        make(tiny_multimodal(), tmp_path, target_modules=r".*language_model.*(q|up)_proj"), TOKENS
    )
    new, old = "base_model.model.model.language_model.", f"base_model.model.{theirs}"
    rewrite(
        tmp_path,
        lambda t: {name.replace(new, old): x for name, x in t.items()},
        target_modules=["q_proj", "up_proj"],
    )
    same(read_here(bases("multimodal"), tmp_path)[0], expected)


def test_biases_of_some_layers_are_read_and_cannot_be_written(bases, tmp_path):
    expected = hf_logits(
        make(
            BASES["biased"](),
            tmp_path / "a",
            target_modules=["q_proj"],
            bias="lora_only",
            layers_to_transform=[0, 2],
        ),
        TOKENS,
    )
    logits, adapters, spec = read_here(bases("biased"), tmp_path / "a")
    same(logits, expected)
    with pytest.raises(UserError, match="PEFT trains whole modules in full"):
        hub.save_peft(tmp_path / "b", adapters, spec, *bases("biased")[1:3])


def test_an_adapter_of_the_vision_tower_alone_is_refused(bases, tmp_path):
    make(tiny_multimodal(), tmp_path, target_modules=r".*vision_tower.*q_proj")
    assert "target_modules='.*vision_tower.*q_proj' are no modules of this model" in refused(
        bases("multimodal"), tmp_path
    )


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize(
    "dtype", [None, ml_dtypes.bfloat16, np.float16], ids=["float32", "bfloat16", "float16"]
)
def test_half_precision_and_copies_of_both_tables(bases, tmp_path, kind, dtype):
    """Copies in half precision are those of the base rounded; peft would round the base to them."""
    expected = hf_logits(
        make(
            BASES[kind](),
            tmp_path,
            target_modules=["q_proj", "down_proj"],
            save={"save_embedding_layers": True},
        ),
        TOKENS,
    )
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    assert {
        "base_model.model.model.embed_tokens.weight",
        "base_model.model.lm_head.weight",
    } < tensors.keys()
    if dtype is not None:
        rewrite(
            tmp_path, lambda t: {name: x.astype(dtype) for name, x in t.items() if "lora" in name}
        )
        expected = hf_logits(read_there(BASES[kind](), tmp_path), TOKENS)
        rewrite(tmp_path, lambda _: {name: x.astype(dtype) for name, x in tensors.items()})
    logits, adapters, _ = read_here(bases(kind), tmp_path)
    same(logits, expected)
    assert set(adapters) == {"layers/attn/q_proj/kernel", "layers/mlp/down_proj/kernel"}


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_copies_of_another_base_are_named(bases, tmp_path, kind):
    family = {"tie_word_embeddings": kind == "tied"}
    make(
        tiny_hf("qwen3", seed=1, **family),
        tmp_path,
        target_modules=["q_proj"],
        save={"save_embedding_layers": True},
    )
    assert "weight' is not the table of this base, of which 101 of 101 rows differ" in refused(
        bases(kind), tmp_path
    )


def test_a_copy_of_the_embedding_with_another_of_its_tied_head_is_refused(bases, tmp_path):
    make(BASES["tied"](), tmp_path, target_modules=["q_proj"], save={"save_embedding_layers": True})

    def changed(tensors, name):
        tensors[f"base_model.model.{name}.weight"][7] += 1
        return tensors

    rewrite(tmp_path, lambda t: changed(t, "model.embed_tokens"))
    assert "lm_head.weight' is not as 'base_model.model.model.embed_tokens.weight'" in refused(
        bases("tied"), tmp_path
    )
    rewrite(tmp_path, lambda t: changed(t, "lm_head"))
    assert "embed/embedding" in hub.load_peft(tmp_path, *bases("tied")[1:3])[1].trained
    rewrite(tmp_path, trainable_token_indices=[200])  # a row that is not there
    assert "of which 1 of 101 rows differ" in refused(bases("tied"), tmp_path)


RESIZED = {
    "copies": dict(target_modules=["q_proj"]),
    "in full": dict(
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
        ensure_weight_tying=True,
    ),
    "rows": dict(target_modules=["q_proj"], trainable_token_indices=[101, 102, 103]),
}


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize("case", RESIZED)
def test_a_resized_vocabulary(bases, tmp_path, kind, case):
    """The new rows are drawn at each resizing: those of the adapter count. A base that was not
    resized is told of it."""

    def resized(seed: int) -> transformers.PreTrainedModel:
        hf = transformers.AutoModelForCausalLM.from_pretrained(
            bases(kind)[0], attn_implementation="eager"
        )
        torch.manual_seed(seed)
        hf.resize_token_embeddings(104)
        return hf.eval()

    expected = hf_logits(make(resized(0), tmp_path / "a", **RESIZED[case]), TOKENS)
    for seed in (0, 1):
        hf = resized(seed)
        model, params = carry_over(hf, tmp_path / f"base {seed}")
        logits, _, spec = read_here((None, model, params, quick_jit(model.apply)), tmp_path / "a")
        # else the head's own copy is not stored by peft
        if case != "rows" or kind == "tied" or seed == 0:
            same(logits, expected)
        same(logits, hf_logits(read_there(hf, tmp_path / "a"), TOKENS))
        assert ("embed/" in spec.trained) == (case == "in full" or (case == "copies" and seed == 1))
    message = refused(bases(kind), tmp_path / "a")
    assert "104" in message and "101" in message and ("resized" in message or case == "rows")


@pytest.mark.parametrize(
    "config",
    [
        dict(target_modules=["lm_head"]),
        dict(target_modules=["q_proj", "lm_head"]),
        dict(target_modules=["embed_tokens", "lm_head"]),
        dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
        dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        dict(target_modules=["embed_tokens"]),
    ],
    ids=str,
)
def test_a_head_apart_from_its_embedding_needs_a_base_with_one(bases, tmp_path, config):
    """PEFT computes with two tables here: the error says so, and the base that it asks for reads
    the adapter."""
    expected = hf_logits(make(BASES["tied"](), tmp_path / "a", **config), TOKENS)
    assert "give it a head of its own (tie_word_embeddings false" in refused(
        bases("tied"), tmp_path / "a"
    )
    tensors = safetensors.numpy.load_file(bases("tied")[0] / "model.safetensors")
    (tmp_path / "base").mkdir()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    safetensors.numpy.save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    settings = json.loads((bases("tied")[0] / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(
        json.dumps({**settings, "tie_word_embeddings": False})
    )
    model, params = hub.load(str(tmp_path / "base"))
    logits, *_ = read_here((None, model, params, quick_jit(model.apply)), tmp_path / "a")
    same(logits, expected)


@pytest.mark.parametrize(
    "fields",
    [
        {"eva_config": {"rho": 2.0, "tau": 0.99}},
        {"loftq_config": {"loftq_bits": 4, "loftq_iter": 1}},
        {"lora_ga_config": {"direction": "ArB2r"}},
        {"corda_config": {"corda_method": "kpm"}},
        {"velora_config": {"num_groups": 4}},
        {"runtime_config": {"ephemeral_gpu_offload": True}},
        {"fan_in_fan_out": True},
        {
            "auto_mapping": {"base_model_class": "X", "parent_library": "y"},
            "revision": "main",
            "peft_version": "9",
            "inference_mode": False,
        },
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_fields_of_training_change_nothing(bases, tmp_path, fields):
    expected = hf_logits(
        make(BASES["untied"](), tmp_path, target_modules=["q_proj", "up_proj"]), TOKENS
    )
    rewrite(tmp_path, **fields)
    same(read_here(bases("untied"), tmp_path)[0], expected)
