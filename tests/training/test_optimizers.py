from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from kafjax.training.optimizers import decayed, make, warmup_cosine


def test_schedule_rises_then_falls_to_its_floor():
    schedule = jax.vmap(warmup_cosine(0.5, 100, warmup_fraction=0.1, floor_fraction=0.2))
    rates = np.asarray(schedule(jnp.arange(101)))
    assert rates[0] > 0
    assert rates.argmax() == 10 and rates[10] == pytest.approx(0.5)
    assert (np.diff(rates[:11]) > 0).all() and (np.diff(rates[10:]) < 0).all()
    assert rates[55] == pytest.approx((0.5 + 0.1) / 2)  # half way down the cosine
    assert rates[100] == pytest.approx(0.1)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_schedule_of_a_very_short_run_is_positive(steps):
    schedule = warmup_cosine(1.0, steps, warmup_fraction=0.5)
    assert all(0 < float(schedule(step)) <= 1 for step in range(steps))


def test_norms_and_biases_do_not_decay_and_adapters_do():
    leaf = jnp.ones(1)
    params = {"q_proj": {"kernel": leaf, "bias": leaf}, "norm": {"scale": leaf}, "embed": {"embedding": leaf}}
    assert decayed(params) == {"q_proj": {"kernel": True, "bias": False}, "norm": {"scale": False}, "embed": {"embedding": True}}
    adapter = {"layers/norm/kernel": {"a": leaf, "b": leaf, "magnitude": leaf}}
    assert decayed(adapter) == {"layers/norm/kernel": {"a": True, "b": True, "magnitude": False}}


@pytest.mark.parametrize("lora_plus", [1.0, 16.0])
def test_equals_torch_adamw_with_clipping_decay_and_lora_plus(lora_plus):
    """LoRA+ (Hayou et al. 2024) is a parameter group with `lora_plus` times the rate, as in peft's `create_loraplus_optimizer`."""
    rng = np.random.default_rng(1)
    shapes = {"dense": {"kernel": (4, 3), "bias": (3,)}, "norm": {"scale": (4,)}, "x/kernel": {"a": (4, 2), "b": (2, 3), "magnitude": (3,)}}
    start = jax.tree.map(rng.standard_normal, shapes, is_leaf=lambda x: isinstance(x, tuple))
    start = jax.tree.map(lambda x: x.astype(np.float32), start)
    random_like = lambda scale: jax.tree.map(lambda x: (scale * rng.standard_normal(x.shape)).astype(np.float32), start)  # noqa: E731
    gradients = [random_like(scale) for scale in (3, 0.1, 1, 5, 0.01)]
    schedule = warmup_cosine(0.1, len(gradients), warmup_fraction=0.4)

    optimizer = make("adamw", schedule, weight_decay=0.3, clip_norm=1.0, lora_plus=lora_plus)
    params, state = start, optimizer.init(start)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)

    theirs = jax.tree.map(lambda x: torch.nn.Parameter(torch.tensor(x)), start)
    groups = [
        {"params": [theirs["x/kernel"]["b"]], "weight_decay": 0.3, "times": lora_plus},
        {"params": [theirs["dense"]["kernel"], theirs["x/kernel"]["a"]], "weight_decay": 0.3},
        {"params": [theirs["dense"]["bias"], theirs["norm"]["scale"], theirs["x/kernel"]["magnitude"]], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.999), eps=1e-8)
    for step, gradient in enumerate(gradients):
        for group in reference.param_groups:
            group["lr"] = group.get("times", 1) * float(schedule(step))
        jax.tree.map(lambda p, g: setattr(p, "grad", torch.tensor(g)), theirs, gradient)
        torch.nn.utils.clip_grad_norm_(jax.tree.leaves(theirs), 1.0)
        reference.step()
    for ours, expected in zip(jax.tree.leaves(params), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(ours, expected.detach().numpy(), rtol=2e-5, atol=1e-6)
