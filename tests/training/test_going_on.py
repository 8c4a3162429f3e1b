"""A training that goes on from an adapter begins where that one ended."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from kafjax import lora
from kafjax.core.errors import UserError
from kafjax.training import TrainConfig, train

CONFIG = TrainConfig(steps=3, batch_rows=4, seq_len=16, learning_rate=1e-2, warmup_fraction=0.0)
SPEC = lora.Spec(rank=2, targets="q_proj|v_proj")


@pytest.fixture(scope="module")
def first(model, params, examples):
    return train(model, params, [examples], CONFIG, spec=SPEC)


def test_its_first_loss_is_that_of_the_adapter_merged_into_the_base(model, params, examples, first):
    merged = lora.merge(params, first.trainable, SPEC)
    from_new = train(model, merged, [examples], CONFIG, spec=SPEC)
    on = train(model, params, [examples], CONFIG, spec=SPEC, start=first.trainable)
    np.testing.assert_allclose(on.curve[0]["loss"], from_new.curve[0]["loss"], atol=1e-5)
    assert on.curve[0]["loss"] < first.curve[0]["loss"] - 1e-3
    # what it began with is left as it was, and so is the rank
    assert jax.tree.map(np.shape, on.trainable) == jax.tree.map(np.shape, first.trainable)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(first.trainable))


def test_an_adapter_that_it_cannot_go_on_from_is_refused(model, params, examples, first):
    pissa = lora.Spec(rank=2, targets="q_proj|v_proj", init="pissa")
    with pytest.raises(UserError, match="cannot go on from an adapter"):
        train(model, params, [examples], CONFIG, spec=pissa, start=first.trainable)
    other = lora.Spec(rank=4, targets="q_proj|v_proj")
    with pytest.raises(UserError):
        train(model, params, [examples], CONFIG, spec=other, start=first.trainable)
