"""Every variant of LoRA, trained end to end: what it starts from, what it leaves alone, what is
saved, what a resume repeats."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kafjax import lora
from kafjax.core.errors import UserError
from kafjax.parallel import make_mesh
from kafjax.training import Batches, TrainConfig, objective, train
from kafjax.training.task import Task
from tests.variants import SINGLE, TOGETHER

CONFIG = TrainConfig(
    steps=4, batch_rows=4, seq_len=16, learning_rate=3e-3, lora_plus=2.0, checkpoint_every=2
)
TOKENS = np.arange(1, 13, dtype=np.int32).reshape(1, 12)


def same(a, b) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def interrupt(**row):
    if row["step"] == 3:
        raise KeyboardInterrupt


@pytest.fixture(scope="module", params=TOGETHER)
def spec(request):
    return TOGETHER[request.param]


def test_a_resumed_training_repeats_the_uninterrupted_one_bit_for_bit(
    model, params, examples, spec, tmp_path
):
    """Residual bases and dropout masks too. The base itself stays as it was."""
    before = jax.tree.map(np.array, params)
    straight = train(model, params, [examples], CONFIG, spec=spec, run_dir=tmp_path / "straight")
    assert straight.trainable_parameters == lora.count(spec, params)
    with pytest.raises(KeyboardInterrupt):
        train(
            model, params, [examples], CONFIG, spec=spec, run_dir=tmp_path / "broken", log=interrupt
        )
    resumed = train(model, params, [examples], CONFIG, spec=spec, run_dir=tmp_path / "broken")
    assert resumed.curve == straight.curve and resumed.spec == straight.spec
    assert same(resumed.trainable, straight.trainable) and same(before, params)


@pytest.fixture(scope="module")
def apply(model):
    return jax.jit(model.apply)


@pytest.mark.parametrize(
    ("name", "param_dtype"),
    [
        *((name, "float32") for name in SINGLE | TOGETHER),
        *((name, "bfloat16") for name in TOGETHER),
    ],
)
def test_what_is_given_back_belongs_to_the_params_that_were_given(
    model, params, apply, name, param_dtype, tmp_path
):
    """Training starts at the base. Its result beside its own base equals the adapter that is
    returned, saved, read and merged."""
    spec = (SINGLE | TOGETHER)[name]
    task = Task.lora(
        model,
        params,
        dataclasses.replace(CONFIG, steps=1, param_dtype=param_dtype),
        make_mesh(),
        1,
        spec,
    )
    start = jax.tree.map(lambda x: x.astype(jnp.float32), task.make_trainable())
    key = jax.random.key(0)

    def inside(state):
        return apply(lora.attach(task.frozen, state, spec), TOKENS)

    rounding = {
        "float32": 2e-5,
        "bfloat16": 3e-2 if spec.dora or spec.trained or spec.token_rows else 2e-5,
    }[param_dtype]
    np.testing.assert_allclose(inside(start), apply(params, TOKENS), atol=rounding)

    noise = np.random.default_rng(0)
    trained = jax.tree.map(
        lambda x: x + jnp.array(0.1 * noise.standard_normal(x.shape, np.float32)), start
    )
    for path, rank in lora.ranks(spec, params).items():  # what pads a rank stays zero in training
        padding = np.arange(rank.max()) >= rank[..., None]
        trained[path]["a"] = jnp.where(padding[..., None, :], 0, trained[path]["a"])
        trained[path]["b"] = jnp.where(padding[..., :, None], 0, trained[path]["b"])
    adapters, plain = task.finished(trained)
    assert not plain.changes_base and (
        plain.rank == 2 * spec.rank if spec.changes_base else plain == spec
    )
    lora.save(tmp_path / "adapter.safetensors", adapters, plain)
    loaded, read = lora.load(tmp_path / "adapter.safetensors", params)
    assert read == plain and same(loaded, adapters)
    for change in (lora.attach, lora.merge):
        np.testing.assert_allclose(
            apply(change(params, loaded, read), TOKENS), inside(trained), atol=5e-5
        )
    assert np.abs(inside(trained) - apply(params, TOKENS)).max() > 0.1
    dropped = apply(task.combine(trained, task.frozen, key), TOKENS)
    assert np.array_equal(dropped, inside(trained)) == (not spec.dropout)


def test_an_adapter_that_needs_another_base_is_not_saved(params, tmp_path):
    spec = SINGLE["pissa"]
    with pytest.raises(UserError, match=r"init='pissa' stands beside .* `lora.plain`"):
        lora.save(
            tmp_path / "adapter.safetensors", lora.init(spec, params, jax.random.key(0)), spec
        )
    assert not list(tmp_path.iterdir())


def test_dropout_is_drawn_from_the_seed_the_step_and_the_microbatch(model, params, examples):
    """The loss of each step, of two microbatches of the same rows, is that under keys which nothing
    else has used."""
    # so that dropping is seen from the start
    spec = dataclasses.replace(SINGLE["dropout"], dropout=0.5, init="olora")
    config = TrainConfig(
        steps=2, batch_rows=8, seq_len=16, learning_rate=1e-30, accumulate=2, seed=5
    )
    task = Task.lora(model, params, config, make_mesh(), 2, spec)
    once = Batches([examples], seq_len=16, batch_rows=4, epochs=1)[0]
    twice = jax.tree.map(lambda x: np.stack([x, x]), once)
    start, step, state = task.make_trainable(), task.compile(twice).step, task.new_state()
    loss = jax.jit(lambda key: objective.loss(model, task.combine(start, task.frozen, key), once))
    seen = []
    for n in range(2):
        state, metrics = step(state, task.frozen, twice)
        key, _ = jax.random.split(jax.random.fold_in(jax.random.key(5), n))
        expected = [loss(key) for key in jax.random.split(key, 2)]
        assert float(metrics["loss"]) == pytest.approx(
            np.mean([total / weight for total, weight in expected]), rel=1e-5
        )
        seen += [float(total) for total, _ in expected]
    assert len({round(total, 3) for total in seen}) == 4
