from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kafjax import lora
from kafjax.core import trees
from kafjax.parallel import make_mesh, shardings
from kafjax.training import Batches, TrainConfig
from kafjax.training.step import make_step, new_state, state_shardings
from kafjax.training.task import Task


def one_sgd_step(model, params, batch, accumulate):
    """Returns the gradient, as the change of the parameters with learning rate 1 and no
    momentum."""
    mesh, optimizer = make_mesh(), optax.sgd(1.0)
    state = new_state(jax.tree.map(jnp.copy, params), optimizer)
    places = state_shardings(shardings(model.axes(), params, mesh), state, mesh)

    def combine(trainable, frozen, key):
        return trainable

    schedule = optax.constant_schedule(1.0)
    step = make_step(
        model,
        combine,
        optimizer,
        schedule,
        mesh=mesh,
        state_shardings=places,
        frozen_shardings={},
        accumulate=accumulate,
        chunk=16,
    )
    state, metrics = step(state, {}, batch)
    return state.trainable, jax.device_get(metrics)


def test_microbatches_of_unequal_weight_add_up_to_the_whole_batch(model, params, examples):
    def build(accumulate):
        return Batches([examples], seq_len=16, batch_rows=4, epochs=1, accumulate=accumulate)[0]

    whole, micro = build(1), build(4)
    assert len(set(micro.weights_SxN.sum(axis=(1, 2)).tolist())) > 1
    at_once, metrics = one_sgd_step(model, params, whole, 1)
    added_up, metrics_micro = one_sgd_step(model, params, micro, 4)
    for path, leaf in trees.flatten(at_once).items():
        np.testing.assert_allclose(leaf, trees.flatten(added_up)[path], atol=2e-6, err_msg=path)
    for name in metrics:
        assert metrics_micro[name] == pytest.approx(metrics[name], rel=1e-5), name
    assert metrics["targets"] == whole.weights_SxN.sum()


def test_frozen_embedding_has_neither_gradient_nor_optimizer_state(model, params):
    config = TrainConfig()
    task = Task.full(model, params, config, make_mesh(), n_steps=1)
    paths = [
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(task.abstract)
    ]
    assert not [path for path in paths if "embed'" in path]
    everything = Task.full(
        model, params, dataclasses.replace(config, freeze_embedding=False), make_mesh(), n_steps=1
    )
    paths = [
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(everything.abstract)
    ]
    # the parameter and its two moments
    assert len([path for path in paths if "embed'" in path]) == 3
    assert not trees.flatten(everything.frozen)


def test_state_of_lora_is_that_of_the_adapter(model, params):
    task = Task.lora(
        model, params, TrainConfig(), make_mesh(), 1, lora.Spec(rank=2, targets="q_proj")
    )
    expected = 2 * 2 * (16 + 16)  # layers, rank, in + out
    assert sum(x.size for x in jax.tree.leaves(task.abstract.trainable)) == expected
    moments = [x for x in jax.tree.leaves(task.abstract.opt_state) if x.ndim]
    assert sum(x.size for x in moments) == 2 * expected


def test_master_weights_are_float32_and_frozen_ones_are_cast_once(model, params):
    low = dataclasses.replace(model, dtype=jnp.bfloat16)
    task = Task.full(low, params, TrainConfig(), make_mesh(), n_steps=1)
    assert {x.dtype for x in jax.tree.leaves(task.abstract.trainable)} == {np.dtype(np.float32)}
    assert task.frozen["embed"]["embedding"].dtype == jnp.bfloat16
    adapter = Task.lora(low, params, TrainConfig(), make_mesh(), 1, lora.Spec(rank=2))
    dtypes = {path: leaf.dtype for path, leaf in trees.flatten(adapter.frozen).items()}
    assert all(
        dtype == (jnp.float32 if path.endswith("scale") else jnp.bfloat16)
        for path, dtype in dtypes.items()
    )


def test_frozen_parameters_in_the_right_dtype_are_not_copied(model, params):
    task = Task.lora(model, params, TrainConfig(), make_mesh(), 1, lora.Spec(rank=2))
    for ours, theirs in zip(jax.tree.leaves(task.frozen), jax.tree.leaves(params), strict=True):
        assert (
            ours.addressable_data(0).unsafe_buffer_pointer()
            == theirs.addressable_data(0).unsafe_buffer_pointer()
        )
