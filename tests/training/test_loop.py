from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kafjax import lora
from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.core.rundir import Run
from kafjax.training import TrainConfig, train

CONFIG = TrainConfig(epochs=2, batch_rows=4, seq_len=16, learning_rate=3e-3)
SPEC = lora.Spec(rank=4, alpha=8)


def same(a, b) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.fixture(scope="module", params=["full", "lora"])
def spec(request):
    return SPEC if request.param == "lora" else None


@pytest.fixture(scope="module")
def trained(model, params, examples, spec):
    before = jax.tree.map(np.array, params)
    result = train(model, params, [examples], CONFIG, spec=spec)
    return before, result


def test_params_stay_as_they_were(params, trained):
    before, result = trained
    assert same(before, params)
    assert result.curve[-1]["loss"] < result.curve[0]["loss"]


def test_what_comes_back_is_what_trains(params, trained, spec):
    _, result = trained
    if spec is not None:
        assert set(result.trainable) == set(lora.abstract(spec, params))
        return
    assert trees.flatten(result.trainable).keys() == trees.flatten(params).keys() - {
        "embed/embedding"
    }
    assert not np.array_equal(
        result.trainable["layers"]["mlp"]["up_proj"]["kernel"],
        params["layers"]["mlp"]["up_proj"]["kernel"],
    )


def test_donated_parameters_are_gone_and_the_result_is_the_same(
    model, params, examples, trained, spec
):
    _, expected = trained
    given = jax.tree.map(jnp.copy, params)
    result = train(model, given, [examples], CONFIG, spec=spec, donate=True)
    assert same(result.trainable, expected.trainable)
    gone = {path for path, leaf in trees.flatten(given).items() if leaf.is_deleted()}
    assert gone == (set() if spec else trees.flatten(result.trainable).keys())


def test_bill_adds_up(trained, examples, model, params):
    _, result = trained
    n_parameters = sum(x.size for x in jax.tree.leaves(result.trainable))
    assert result.trainable_parameters == n_parameters
    # two float32 moments, and counters
    assert 8 * n_parameters <= result.optimizer_bytes <= 8 * n_parameters + 64
    assert result.targets == CONFIG.epochs * sum(
        int(example.weights[1:].sum()) for example in examples
    )
    assert result.steps == len(result.curve)
    assert [row["step"] for row in result.curve] == list(range(1, result.steps + 1))
    assert sum(row["targets"] for row in result.curve) == result.targets <= result.tokens
    # The head alone costs this much: forward and the gradient of the hidden states, at each padded
    # target.
    head = 4 * model.unembedding(params).size * result.targets
    assert result.flops_measured > head
    places = sum(row["loss_places"] for row in result.curve)
    assert result.targets <= places and result.flops_useful > head
    assert result.flops_measured - result.flops_useful == pytest.approx(
        4 * model.unembedding(params).size * (places - result.targets)
    )
    assert result.peak_memory_bytes > result.optimizer_bytes


def test_flops_do_not_depend_on_how_the_work_is_cut(model, params, examples):
    cut = dataclasses.replace(CONFIG, steps=1, accumulate=4, loss_chunk=8)
    counts = [
        train(model, params, [examples], config).flops_measured
        for config in (dataclasses.replace(CONFIG, steps=1), cut)
    ]
    # Cutting may pad targets a little more, and the optimizer's few operations a parameter are
    # counted per microbatch.
    assert counts[1] == pytest.approx(counts[0], rel=0.5) and counts[1] >= 0.9 * counts[0]


def interrupt_at(step: int):
    def log(**row):
        if row["step"] == step:
            raise KeyboardInterrupt

    return log


def test_resumed_training_repeats_the_uninterrupted_one_bit_for_bit(
    model, params, examples, spec, trained, tmp_path
):
    _, straight = trained
    config = dataclasses.replace(CONFIG, checkpoint_every=2)
    for step in (5, 6):  # interrupted twice, the second time in the part that is done again
        with pytest.raises(KeyboardInterrupt):
            train(
                model,
                params,
                [examples],
                config,
                spec=spec,
                run_dir=tmp_path,
                log=interrupt_at(step),
            )
    rows = []
    resumed = train(
        model,
        params,
        [examples],
        config,
        spec=spec,
        run_dir=tmp_path,
        log=lambda **row: rows.append(row),
    )
    assert rows[0]["step"] == 5
    assert resumed.curve == straight.curve
    assert same(resumed.trainable, straight.trainable)
    assert resumed.tokens == straight.tokens


def test_checkpoints_of_another_training_are_refused(model, params, examples, tmp_path):
    config = dataclasses.replace(CONFIG, checkpoint_every=1, steps=2)
    train(model, params, [examples], config, run_dir=tmp_path)
    for changed in ({"learning_rate": 1e-4}, {"seed": 1}):
        with pytest.raises(UserError, match="another model, settings or data"):
            train(
                model, params, [examples], dataclasses.replace(config, **changed), run_dir=tmp_path
            )
    with pytest.raises(UserError, match="another model, settings or data"):
        train(model, params, [examples[1:]], config, run_dir=tmp_path)
    with pytest.raises(UserError, match="another model, settings or data"):
        train(model, params, [examples], config, run_dir=tmp_path, spec=SPEC)


@pytest.mark.parametrize("spec", [None, lora.Spec(rank=8, alpha=16)], ids=["full", "lora"])
def test_four_examples_are_learned_by_heart(model, params, examples, spec):
    # With rows of one length every token is the best in some direction, which a frozen random
    # embedding does not grant.
    embedding = params["embed"]["embedding"]
    params = {
        **params,
        "embed": {"embedding": 4 * embedding / jnp.linalg.norm(embedding, axis=1, keepdims=True)},
    }
    config = TrainConfig(steps=100, batch_rows=4, seq_len=16, learning_rate=2e-2)
    result = train(model, params, [examples[:4]], config, spec=spec)
    assert result.curve[0]["loss"] > 3
    assert result.curve[-1]["loss"] < 0.15


def test_bfloat16_compute_follows_float32(model, params, examples):
    exact = train(model, params, [examples], CONFIG)
    low = train(dataclasses.replace(model, dtype=jnp.bfloat16), params, [examples], CONFIG)
    assert {x.dtype for x in jax.tree.leaves(low.trainable)} == {np.dtype(np.float32)}
    losses = [[row["loss"] for row in result.curve] for result in (exact, low)]
    assert losses[0] != losses[1]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.02)


def test_steps_run_on_past_the_epochs_or_stop_short(model, params, examples):
    short, long = (
        train(model, params, [examples], dataclasses.replace(CONFIG, steps=steps))
        for steps in (2, 11)
    )
    assert (short.steps, long.steps) == (2, 11)
    assert short.curve[0]["loss"] == long.curve[0]["loss"]
    assert short.targets == sum(row["targets"] for row in short.curve)


def test_metrics_reach_the_run_directory(model, params, examples, tmp_path):
    result = train(
        model,
        params,
        [examples],
        dataclasses.replace(CONFIG, steps=2),
        log=Run(tmp_path).log,
        label="full",
    )
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [
        {k: v for k, v in row.items() if k not in ("time", "label")} for row in rows
    ] == result.curve
    assert {row["label"] for row in rows} == {"full"}


def test_diverging_training_is_told(model, params, examples):
    config = dataclasses.replace(CONFIG, learning_rate=1e30)
    with pytest.raises(UserError, match=r"step 2; lower the learning rate \(1e\+30\)"):
        train(model, params, [examples], config)


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"steps": 0},
        {"accumulate": 0},
    ],
)
def test_bad_settings_are_told(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        TrainConfig(**bad)


def test_checkpoints_need_a_place(model, params, examples):
    with pytest.raises(UserError, match="run directory"):
        train(model, params, [examples], dataclasses.replace(CONFIG, checkpoint_every=1))
