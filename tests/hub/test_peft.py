"""Adapters in PEFT's format against the real `peft`: made there and read here, made here and read there, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import json
import pickle
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import FAMILIES, carry_over, hf_logits, quick_jit, random_tokens, tiny_hf

from kafjax import hub, lora
from kafjax.core.errors import UserError
from kafjax.lora import Spec

TOKENS = random_tokens(0, (2, 9), 101)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# What `peft.LoraConfig` is made with, and what is to come of it here.
THEIRS = {
    "plain": dict(r=4, lora_alpha=7, target_modules=["q_proj", "v_proj"], lora_dropout=0.1),
    "all-linear": dict(r=2, target_modules="all-linear", use_rslora=True),
    "dora": dict(r=3, lora_alpha=9, target_modules=ALL, use_dora=True, layers_to_transform=[0, 2]),
    "regex": dict(r=3, target_modules=r"model\.layers\.[13]\.(self_attn\.o|mlp\.up)_proj"),
    "patterns": dict(
        r=4,
        lora_alpha=6,
        target_modules=["self_attn.q_proj", "down_proj", "model.layers.1.mlp.up_proj"],
        rank_pattern={"layers.2.self_attn.q_proj": 2, "down_proj": 5, r"layers\.\d+\.self_attn\.q_proj": 3},
        alpha_pattern={r".*layers\.[01]\.mlp\.down_proj": 2.5, "up_proj": 1},
    ),
    "one layer, without": dict(r=2, target_modules=ALL, layers_to_transform=1, layers_pattern="layers", exclude_modules=["mlp.up_proj"]),
    "saved": dict(r=2, target_modules=["q_proj"], modules_to_save=["model.norm", "post_attention_layernorm", "gate_proj"]),
    "gaussian": dict(r=2, target_modules=["k_proj"], init_lora_weights="gaussian"),
    "pissa": dict(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa"),
    "olora": dict(r=3, lora_alpha=5, target_modules=["k_proj", "o_proj"], init_lora_weights="olora", use_rslora=True),
    "pissa dora": dict(r=2, target_modules=["v_proj"], init_lora_weights="pissa", use_dora=True, rank_pattern={"layers.1.self_attn.v_proj": 3}),
}
OURS = {
    "plain": Spec(rank=4, alpha=7.0, targets="(q|v)_proj", dropout=0.25),
    "all-linear": Spec(rank=2, alpha=3.0, targets="all-linear", rslora=True),
    "attention": Spec(rank=3, targets="attention", layers=(1, 2)),
    "mlp": Spec(rank=3, targets="mlp", dora=True, layers=(0,)),
    "dora": Spec(rank=2, targets="(q|o|up)_proj", dora=True, rslora=True, rank_pattern={"up": 5}),
    "patterns": Spec(
        rank=4, alpha=6.0, targets="q_proj|layers/1/mlp|down", rank_pattern={"layers/2/": 2, "q": 3}, alpha_pattern={"layers/[01]/mlp": 2.5}
    ),
    "saved": Spec(rank=2, targets="q_proj", trained=r"final_norm|attn_norm|gate_proj"),
    "pissa": Spec(rank=4, alpha=9.0, targets="k_proj|down", init="pissa", rank_pattern={"layers/0/": 2}),
    "olora": Spec(rank=3, targets="(q|v)_proj", init="olora", rslora=True, dora=True),
}
MAIN = ("gemma3_text", "qwen2")  # tied and with other norms; untied and with biases
CASES = lambda cases: [(f, c) for f in FAMILIES for c in cases if f in MAIN or c in ("plain", "dora", "patterns")]  # noqa: E731


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """`bases(family)`: folder, model and parameters of a tiny random base, and its compiled logits."""

    @functools.cache
    def base(family: str):
        folder = tmp_path_factory.mktemp(family)
        model, params = carry_over(tiny_hf(family), folder)
        return folder, model, params, quick_jit(model.apply)

    return base


def theirs(family: str, **config) -> peft.PeftModel:
    """A `peft` model with everything random that it trains."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft's, about tied weights and about PiSSA
        model = peft.get_peft_model(tiny_hf(family), peft.LoraConfig(**config)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def read_there(family: str, folder: Path) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected) adapter keys.*")
        return peft.PeftModel.from_pretrained(tiny_hf(family), folder).eval()


def random_adapter(spec: Spec, params, seed: int = 0) -> tuple[lora.Adapters, Spec]:
    """Everything an adapter of `spec` trains, moved at random from its start; PiSSA and OLoRA made plain."""
    initial = lora.init(spec, params, jax.random.key(seed))
    rng, rank = np.random.default_rng(seed), lora.ranks(spec, params)

    def moved(path: str, name: str, array: jax.Array) -> jax.Array:
        noise = 0.2 * rng.standard_normal(array.shape, np.float32)
        if path in rank and name in ("a", "b"):
            own = np.arange(rank[path].max()) < rank[path][..., None]
            noise = noise * (own[..., None, :] if name == "a" else own[..., :, None])
        return array + noise

    trained = {path: {name: moved(path, name, array) for name, array in parts.items()} for path, parts in initial.items()}
    return lora.plain(params, trained, initial, spec)


def same_effect(one: Spec, other: Spec, params) -> None:
    """Ranks and alphas of every layer, and what else makes the update, are the same."""
    for resolve in (lora.ranks, lora.alphas, lora.scales):
        jax.tree.map(np.testing.assert_array_equal, resolve(one, params), resolve(other, params))
    assert lora.trained(one, params).keys() == lora.trained(other, params).keys()
    for field in ("rslora", "dora", "dropout", "rank", "alpha", "init"):
        assert getattr(one, field) == getattr(other, field)


@pytest.mark.parametrize(("family", "case"), CASES(THEIRS))
def test_made_there_read_here(bases, tmp_path, family, case):
    _, model, params, apply = bases(family)
    reference = theirs(family, **THEIRS[case])
    reference.save_pretrained(tmp_path)
    adapters, spec = hub.load_peft(tmp_path, model, params)
    expected = hf_logits(reference, TOKENS)
    np.testing.assert_allclose(apply(lora.merge(params, adapters, spec), TOKENS), expected, atol=1e-4, rtol=0)
    assert np.abs(apply(params, TOKENS) - expected).max() > 0.01


@pytest.mark.parametrize(("family", "case"), CASES(OURS))
def test_made_here_read_there_and_back(bases, tmp_path, family, case):
    _, model, params, apply = bases(family)
    adapters, spec = random_adapter(OURS[case], params)
    hub.save_peft(tmp_path / "adapter", adapters, spec, model, params, base_name="some/base")
    expected = apply(lora.merge(params, adapters, spec), TOKENS)
    np.testing.assert_allclose(hf_logits(read_there(family, tmp_path / "adapter"), TOKENS), expected, atol=1e-4, rtol=0)
    assert np.abs(apply(params, TOKENS) - expected).max() > 0.01

    back, read = hub.load_peft(tmp_path / "adapter", model, params)
    same_effect(read, spec, params)
    for path, own in lora.ranks(spec, params).items():
        for name in ("a", "b"):
            np.testing.assert_array_equal(back[path][name], adapters[path][name])
        if spec.dora:
            np.testing.assert_array_equal(back[path]["magnitude"][own > 0], adapters[path]["magnitude"][own > 0])
    for path in lora.trained(spec, params):
        jax.tree.map(np.testing.assert_array_equal, back[path], adapters[path])
