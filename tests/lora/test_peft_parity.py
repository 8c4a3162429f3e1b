"""The same numbers in the real `peft` on transformers' Gemma 3: logits, gradients and merged
weights."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from oracles import carry_over, hf_logits, quick_jit, random_tokens, tiny_hf_gemma

from kafjax import lora
from kafjax.core import trees
from kafjax.ops.loss import chunked_cross_entropy

TOKENS = random_tokens(0, (2, 12), 101)
CASES = {
    "all linear": (
        lora.Spec(rank=4, alpha=8.0),
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ),
    "query and value": (lora.Spec(rank=1, alpha=3.0, targets="(q|v)_proj"), ["q_proj", "v_proj"]),
    "down only, scale below one": (
        lora.Spec(rank=8, alpha=2.0, targets="down_proj"),
        ["down_proj"],
    ),
}


@dataclasses.dataclass
class Twins:
    """One adapter twice: here, and as a `peft` model."""

    spec: lora.Spec
    model: object
    params: trees.Tree
    adapters: lora.Adapters
    theirs: peft.PeftModel

    def lora_layers(self):
        """(kernel path, layer, peft's layer) of each adapted module."""
        for name, module in self.theirs.named_modules():
            if hasattr(module, "lora_A"):
                _, rest = name.split("layers.")
                layer, block, projection = rest.split(".")
                yield (
                    f"layers/{'attn' if block == 'self_attn' else 'mlp'}/{projection}/kernel",
                    int(layer),
                    module,
                )


@pytest.fixture(scope="module", params=CASES)
def twins(request, tmp_path_factory):
    spec, modules = CASES[request.param]
    hf = tiny_hf_gemma()
    model, params = carry_over(hf, tmp_path_factory.mktemp("base"))
    rng = np.random.default_rng(5)
    adapters = jax.tree.map(
        lambda x: jnp.array(0.3 * rng.standard_normal(x.shape, np.float32)),
        lora.abstract(spec, params),
    )
    config = peft.LoraConfig(
        r=spec.rank, lora_alpha=spec.alpha, target_modules=modules, lora_dropout=0.0
    )
    pair = Twins(spec, model, params, adapters, peft.get_peft_model(hf, config).eval())
    seen = set()
    with torch.no_grad():
        for path, layer, module in pair.lora_layers():
            module.lora_A["default"].weight.copy_(
                torch.tensor(np.asarray(adapters[path]["a"][layer].T))
            )
            module.lora_B["default"].weight.copy_(
                torch.tensor(np.asarray(adapters[path]["b"][layer].T))
            )
            seen.add((path, layer))
    assert seen == {(path, layer) for path in adapters for layer in range(4)}
    return pair


def test_logits_equal_peft_attached_and_merged(twins):
    reference = hf_logits(twins.theirs, TOKENS)
    apply = quick_jit(twins.model.apply)
    for change in (lora.attach, lora.merge):
        logits = apply(change(twins.params, twins.adapters, twins.spec), TOKENS)
        np.testing.assert_allclose(logits, reference, rtol=2e-5, atol=2e-5)
    assert np.abs(apply(twins.params, TOKENS) - reference).max() > 0.1


def test_gradients_equal_peft(twins):
    """Gradients go through the chunked loss over half of the places, as in training."""
    weights = (jnp.arange(TOKENS[:, 1:].size) % 2).astype(jnp.float32)

    @jax.grad
    def gradient(adapters):
        hidden, _ = twins.model.hidden(lora.attach(twins.params, adapters, twins.spec), TOKENS)
        embedding = twins.params["embed"]["embedding"]
        return chunked_cross_entropy(
            hidden[:, :-1].reshape(-1, 24), embedding, TOKENS[:, 1:].reshape(-1), weights, chunk=8
        )

    ids = torch.tensor(np.asarray(TOKENS)).long()
    twins.theirs.zero_grad()
    losses = torch.nn.functional.cross_entropy(
        twins.theirs(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    (losses * torch.tensor(np.asarray(weights))).sum().backward()
    grads = quick_jit(gradient)(twins.adapters)
    for path, layer, module in twins.lora_layers():
        for name, theirs in (("a", module.lora_A), ("b", module.lora_B)):
            expected = theirs["default"].weight.grad.T.numpy()
            assert np.abs(grads[path][name][layer] - expected).max() < 5e-5 * np.abs(expected).max()
    assert all(p.grad is None for name, p in twins.theirs.named_parameters() if "lora_" not in name)


def test_merged_kernels_equal_pefts(twins):
    merged = trees.flatten(lora.merge(twins.params, twins.adapters, twins.spec))
    for path, layer, module in twins.lora_layers():
        expected = module.base_layer.weight + module.get_delta_weight("default")
        np.testing.assert_allclose(merged[path][layer], expected.detach().numpy().T, atol=2e-6)
