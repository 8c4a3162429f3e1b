"""Lanes against the same adapters trained alone by `train`."""

from __future__ import annotations

import dataclasses
import os
import re
import signal

import jax
import numpy as np
import pytest

from kafjax import lora
from kafjax.core import trees
from kafjax.core.errors import Preempted, UserError
from kafjax.models import Decoder, DecoderConfig
from kafjax.parallel import make_mesh
from kafjax.training import Example, TrainConfig, train
from kafjax.training.lane import EarlyStop, Lane
from kafjax.training.lane_state import repack, smaller
from kafjax.training.lane_step import LaneTask, lane_losses
from kafjax.training.lanes import train_lanes
from kafjax.training.loop import batches_of
from tests import compiling

CONFIG = TrainConfig(steps=50, batch_rows=4, seq_len=16, weight_decay=0.01)
LANES = [
    Lane("r1", lora.Spec(1, 4.0), 3e-3, seed=0),
    Lane("r4", lora.Spec(4, 8.0, rslora=True), 5e-3, seed=1),
    Lane("r8q", lora.Spec(8, 2.0, "q_proj"), 2e-3, seed=0),
    Lane("r3mlp", lora.Spec(3, 12.0, "(gate|up|down)_proj"), 5e-3, seed=2),
    Lane(
        "patterns",
        lora.Spec(2, 6.0, rank_pattern={"layers/1/.*up_proj": 5}, alpha_pattern={"q_proj": 3.0}),
        3e-3,
        seed=1,
    ),
    Lane("layer1", lora.Spec(4, 8.0, "(q|down)_proj", layers=(1,)), 5e-3, seed=2),
]


def losses(curve):
    return np.array([row["loss"] for row in curve])


def same(a, b) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.fixture(scope="module")
def alone(model, params, examples):
    return {
        lane.name: train(model, params, [examples], lane.config(CONFIG), spec=lane.spec)
        for lane in LANES
    }


@pytest.fixture(scope="module")
def together(model, params, examples):
    return train_lanes(model, params, [examples], CONFIG, LANES)


def assert_as_alone(result, expected):
    np.testing.assert_allclose(losses(result.curve), losses(expected.curve), rtol=1e-5)
    for name in ("grad_norm", "learning_rate"):
        np.testing.assert_allclose(
            [r[name] for r in result.curve],
            [r[name] for r in expected.curve],
            rtol=1e-3,
            err_msg=name,
        )
    assert [(r["step"], r["tokens"], r["targets"]) for r in result.curve] == [
        (r["step"], r["tokens"], r["targets"]) for r in expected.curve
    ]
    assert jax.tree.map(np.shape, result.adapters) == jax.tree.map(np.shape, expected.trainable)
    for ours, theirs in zip(
        jax.tree.leaves(result.adapters), jax.tree.leaves(expected.trainable), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)


@pytest.mark.parametrize("lane", LANES, ids=lambda lane: lane.name)
def test_each_lane_is_its_solo_run(together, alone, lane):
    """Ranks, alphas, rates, targets, seeds and data orders mixed: the losses of 50 steps to
    1e-5."""
    result = together[lane.name]
    assert result.ending == "finished" and result.tokens == alone[lane.name].tokens
    assert losses(result.curve)[-5:].mean() < losses(result.curve)[:5].mean()
    assert_as_alone(result, alone[lane.name])


def test_fewer_slots_than_lanes_and_lengths_of_their_own(model, params, examples, alone):
    """Lanes wait, start where another has left, and end at different steps: epochs are packed into
    more rows or fewer."""
    config = dataclasses.replace(CONFIG, steps=None, epochs=3, batch_rows=2)
    variants = [examples, examples[:13]]
    lanes = [dataclasses.replace(lane, seed=seed) for seed, lane in enumerate(LANES[:4])]
    rows = []
    results = train_lanes(
        model, params, variants, config, lanes, slots=2, log=lambda **row: rows.append(row)
    )
    for lane in lanes:
        assert_as_alone(
            results[lane.name], train(model, params, variants, lane.config(config), spec=lane.spec)
        )
        assert [row["step"] for row in rows if row["label"] == lane.name] == [
            row["step"] for row in results[lane.name].curve
        ]
    # else this says less than it seems to
    assert len({len(result.curve) for result in results.values()}) > 1


def test_microbatches_add_up_in_lanes_too(model, params, examples, together):
    config = dataclasses.replace(CONFIG, accumulate=2, loss_chunk=8)
    results = train_lanes(model, params, [examples], config, LANES[:2])
    for lane in LANES[:2]:
        np.testing.assert_allclose(
            losses(results[lane.name].curve), losses(together[lane.name].curve), rtol=1e-4
        )


@pytest.fixture
def compiled_programs():
    """Names of the functions that are compiled while a test runs."""
    names = []

    def listen(event, duration, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def test_one_compile_for_any_mix(model, params, examples, compiled_programs):
    """Six lanes of six ranks, rates and alphas, three targets and three seeds through three slots:
    the step is compiled once."""
    lanes = [
        Lane(
            f"lane{i}",
            lora.Spec(i + 1, 2.0 + i, ("q_proj", "mlp", "_proj")[i % 3]),
            1e-3 * (i + 1),
            seed=i // 2,
        )
        for i in range(6)
    ]
    config = dataclasses.replace(CONFIG, steps=4)
    train_lanes(model, params, [examples], config, lanes, slots=3)
    steps = [name for name in compiled_programs if "step" in name]
    assert len(steps) == 1, compiled_programs


@pytest.mark.optimised  # it is about what XLA makes of the program
def test_one_base_whatever_the_number_of_lanes():
    """Layers are wide, the vocabulary large, tokens few: seven more lanes cost their adapters and
    activations, no base and no logits."""
    sizes = {"hidden_size": 96, "mlp_size": 384, "n_heads": 2, "n_kv_heads": 2, "head_dim": 48}
    config = DecoderConfig(
        vocab_size=20_000, n_layers=4, sliding=(True, False) * 2, window=4, **sizes
    )
    model = Decoder(config)
    params = jax.jit(model.init)(jax.random.key(0))
    shapes = lora.lanes.padded_shapes([lora.Spec(8)], params)
    rng = np.random.default_rng(0)
    text = Example(rng.integers(1, 20_000, 9).astype(np.int32), np.ones(9, np.float32))
    train_config = TrainConfig(steps=1, batch_rows=1, seq_len=8, loss_chunk=32)
    batch = batches_of([[text]], train_config, 1)[0]
    used = {}
    for n in (1, 8):
        task = LaneTask.build(model, params, train_config, make_mesh(), shapes, n)
        used[n] = compiling.memory_of(task.lower(*task.abstract_inputs(batch)))
    base, adapter = trees.n_bytes(params), trees.n_bytes(shapes)
    for n, memory in used.items():
        arguments = memory.argument_size_in_bytes
        assert base + 3 * n * adapter <= arguments <= 1.01 * (base + 3 * n * adapter)
    blocks = trees.n_bytes(params["layers"])
    logits = 32 * 20_000 * 4
    temporary = {n: memory.temp_size_in_bytes for n, memory in used.items()}
    assert temporary[1] > logits  # a chunk of them, so the next line looks at something
    a_lane = (temporary[8] - temporary[1]) / 7
    assert a_lane < adapter + 0.3 * blocks < blocks and a_lane < 0.5 * logits


def test_the_loss_is_chunked_over_all_lanes(model, params, examples):
    """No more than `loss_chunk` rows of logits exist at once, however many lanes there are."""
    shapes = lora.lanes.padded_shapes([lora.Spec(2)], params)
    config = dataclasses.replace(CONFIG, loss_chunk=24)
    task = LaneTask.build(model, params, config, make_mesh(), shapes, 6)
    inputs, batch = task.abstract_inputs(batches_of([examples], config, 1)[0])
    N, _, P = batch.places_SxN.shape
    gradient = jax.grad(
        lambda adapters, scales, batch: lane_losses(model, params, adapters, scales, batch, 24),
        has_aux=True,
    )
    jaxpr = str(jax.make_jaxpr(gradient)(task.abstract.trainable, inputs.scales, batch))
    V = model.config.vocab_size
    rows = {int(n) for n in re.findall(rf"f32\[(\d+),{V}\]", jaxpr)}
    assert rows and max(rows) <= 24 < N * P
    assert not re.findall(rf"f32\[\d+,\d+,{V}\]", jaxpr)


def test_a_lane_that_diverges_leaves_alone(model, params, examples, together, capsys):
    lanes = [
        dataclasses.replace(lane, name="wild", learning_rate=1e30) if lane.name == "r4" else lane
        for lane in LANES
    ]
    results = train_lanes(model, params, [examples], CONFIG, lanes)
    assert results["wild"].ending == "diverged" and len(results["wild"].curve) < 5
    assert "wild: the loss is" in capsys.readouterr().err
    for lane in (lane for lane in lanes if lane.name != "wild"):
        np.testing.assert_allclose(
            losses(results[lane.name].curve), losses(together[lane.name].curve), rtol=1e-6
        )


def test_lanes_that_no_longer_improve_leave_and_the_rest_is_as_it_was(model, params, examples):
    """The held-out texts are random: a lane that learns the others by heart gets worse at these."""
    stop = EarlyStop(examples[:3], every=5, patience=2)
    straight = train_lanes(model, params, [examples[3:]], CONFIG, LANES)
    results = train_lanes(model, params, [examples[3:]], CONFIG, LANES, early_stop=stop)
    assert "stopped" in {result.ending for result in results.values()}
    for name, result in results.items():
        n, checks = len(result.curve), [row["loss"] for row in result.checks]
        assert [row["step"] for row in result.checks] == list(range(5, min(n, 49) + 1, 5))
        np.testing.assert_allclose(
            losses(result.curve), losses(straight[name].curve)[:n], rtol=1e-6
        )
        if result.ending == "stopped":
            assert n < 50 and min(checks[-2:]) >= min(checks[:-2])
        else:
            assert n == 50


def test_repacking_moves_lanes_and_changes_no_value(model, params):
    shapes = lora.lanes.padded_shapes([lane.spec for lane in LANES], params)
    large = LaneTask.build(model, params, CONFIG, make_mesh(), shapes, 8)
    small = large.resized(4)
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), large.abstract)
    packed = repack(state, [6, 1, 3], small)
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(packed), strict=True):
        np.testing.assert_array_equal(after, before[[6, 1, 3, 3]])
    assert [smaller(n, 8, 1) for n in (8, 5, 4, 3, 1)] == [8, 8, 4, 4, 1]
    assert [smaller(n, 16, 4) for n in (9, 8, 3)] == [16, 8, 4]


def interrupt_at(lane: str, step: int):
    def log(label, **row):
        if (label, row["step"]) == (lane, step):
            raise KeyboardInterrupt

    return log


def test_a_lane_resumes_exactly_also_in_other_company_and_alone(
    model, params, examples, together, alone, tmp_path
):
    config = dataclasses.replace(CONFIG, checkpoint_every=10)
    with pytest.raises(KeyboardInterrupt):
        train_lanes(
            model, params, [examples], config, LANES, run_dir=tmp_path, log=interrupt_at("r8q", 25)
        )
    rows = []
    resumed = train_lanes(
        model,
        params,
        [examples],
        config,
        LANES,
        run_dir=tmp_path,
        log=lambda **row: rows.append(row),
    )
    assert {row["step"] for row in rows[: len(LANES)]} == {21}
    for lane in LANES:
        assert resumed[lane.name].curve == together[lane.name].curve
        assert same(resumed[lane.name].adapters, together[lane.name].adapters)
    # The checkpoint is that of the solo run: `train` goes on from the lane's fortieth step.
    rows.clear()
    solo = train(
        model,
        params,
        [examples],
        LANES[1].config(config),
        spec=LANES[1].spec,
        run_dir=tmp_path / "r4",
        log=lambda **row: rows.append(row),
    )
    assert rows[0]["step"] == 41
    np.testing.assert_allclose(losses(solo.curve), losses(alone["r4"].curve), rtol=1e-5)


def test_on_done_gets_each_lane_as_it_ends(model, params, examples):
    config, seen = dataclasses.replace(CONFIG, steps=2), []
    results = train_lanes(
        model,
        params,
        [examples],
        config,
        LANES,
        slots=1,
        on_done=lambda lane, result: seen.append((lane.name, result)),
    )
    assert [name for name, _ in seen] == [lane.name for lane in LANES]
    assert dict(seen) == results


@pytest.mark.parametrize(
    ("lanes", "told"),
    [
        ([], "no lanes to train"),
        ([LANES[0], LANES[0]], "two lanes are named 'r1'"),
        ([Lane("r99", lora.Spec(99), 1e-3)], "rank=99 is above min"),
        ([Lane("none", lora.Spec(1, targets="nothing"), 1e-3)], "match no kernel"),
        ([Lane("zero", lora.Spec(1), 0.0)], "learning_rate=0.0"),
        ([Lane("dora", lora.Spec(1, dora=True), 1e-3)], "dora=True cannot share the base"),
        ([Lane("pissa", lora.Spec(1, init="pissa"), 1e-3)], "init='pissa' cannot share the base"),
        ([Lane("drop", lora.Spec(1, dropout=0.1), 1e-3)], "dropout=0.1 cannot share the base"),
        (
            [Lane("full", lora.Spec(1, trained="final_norm"), 1e-3)],
            "trained='final_norm' cannot share the base",
        ),
    ],
)
def test_lanes_that_cannot_be_are_told(model, params, examples, lanes, told):
    with pytest.raises(UserError, match=told):
        train_lanes(model, params, [examples], CONFIG, lanes)


def test_sigterm_saves_every_lane_at_its_step_and_the_next_call_goes_on(
    model, params, examples, together, tmp_path
):
    config = dataclasses.replace(CONFIG, checkpoint_every=30)
    steps = []

    def log(**row):
        steps.append(row["step"])
        if row["step"] == 7 and row["label"] == "r4":
            os.kill(os.getpid(), signal.SIGTERM)

    def run(**kwargs):
        return train_lanes(model, params, [examples], config, LANES[:2], run_dir=tmp_path, **kwargs)

    with pytest.raises(
        Preempted, match=r"lanes: saved r1 at step 7, r4 at step 7; run the same command again"
    ):
        run(log=log)
    steps.clear()
    results = run(log=log)
    assert min(steps) == 8
    for lane in LANES[:2]:
        np.testing.assert_allclose(
            losses(results[lane.name].curve), losses(together[lane.name].curve), rtol=1e-5
        )


def test_sigterm_without_checkpoints_says_what_is_lost(model, params, examples):
    def log(**row):
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted, match="the steps of 1 lanes are lost, as checkpoints are off"):
        train_lanes(model, params, [examples], CONFIG, LANES[:1], log=log)


def test_a_mixture_of_experts_is_refused(model, examples):
    experts = Decoder(dataclasses.replace(model.config, n_experts=4, experts_per_token=2))
    with pytest.raises(UserError, match="mixture of experts do not train in lanes"):
        train_lanes(experts, experts.init(jax.random.key(0)), [examples], CONFIG, LANES[:1])
