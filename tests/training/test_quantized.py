"""An adapter beside a quantised base trains, and answers, as beside the same base in floats; and
the step holds the small one only."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kafjax import lora
from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.hub.safetensors_out import save
from kafjax.models import Decoder, DecoderConfig
from kafjax.ops.quantized import FORMATS, dequantize_params, quantize_params
from kafjax.parallel import make_mesh
from kafjax.training import TrainConfig, train
from kafjax.training.lane import Lane
from kafjax.training.lane_step import LaneTask
from kafjax.training.lanes import train_lanes
from kafjax.training.loop import batches_of, check_training, fingerprint_of
from kafjax.training.task import Task
from tests import compiling
from tests.devices import on_eight_devices

CONFIG = TrainConfig(steps=6, batch_rows=4, seq_len=16, learning_rate=3e-3)
SPEC = lora.Spec(rank=4)
WIDE = DecoderConfig(
    vocab_size=61,
    hidden_size=128,
    mlp_size=512,
    n_layers=6,
    n_heads=4,
    n_kv_heads=2,
    head_dim=32,
    sliding=(True, False) * 3,
    window=5,
)
formats = pytest.mark.parametrize("format", FORMATS)


def kernels(params: trees.Tree) -> trees.Tree:
    return {path: leaf for path, leaf in trees.flatten(params).items() if path.endswith("/kernel")}


@formats
def test_training_equals_that_beside_the_dequantised_base(model, params, examples, format):
    base = quantize_params(params, format)
    ours = train(model, base, [examples], CONFIG, spec=SPEC)
    theirs = train(model, dequantize_params(base), [examples], CONFIG, spec=SPEC)
    np.testing.assert_allclose(
        [row["loss"] for row in ours.curve], [row["loss"] for row in theirs.curve], rtol=1e-5
    )
    np.testing.assert_allclose(
        [row["grad_norm"] for row in ours.curve],
        [row["grad_norm"] for row in theirs.curve],
        rtol=1e-4,
    )
    assert ours.curve[-1]["loss"] < ours.curve[0]["loss"]
    adapters = jax.device_get(ours.trainable)
    merged = lora.merge(base, adapters, SPEC)
    for path, leaf in trees.flatten(lora.merge(dequantize_params(base), adapters, SPEC)).items():
        assert trees.flatten(merged)[path].dtype == jnp.float32
        np.testing.assert_array_equal(trees.flatten(merged)[path], leaf)
    assert set(lora.drift(base, adapters, SPEC).values()) == {0.0}


@pytest.mark.parametrize("format", [pytest.param("int8", marks=pytest.mark.optimised), "nf4"])
def test_lanes_train_and_slots_answer(model, params, examples, format):
    base = quantize_params(params, format)
    lanes = [
        Lane("r1", lora.Spec(1), 3e-3),
        Lane("r4", lora.Spec(4, targets="q_proj|up_proj"), 5e-3, seed=1),
    ]
    together = train_lanes(model, base, [examples], CONFIG, lanes)
    for lane in lanes:
        alone = train(model, base, [examples], lane.config(CONFIG), spec=lane.spec)
        np.testing.assert_allclose(
            [r["loss"] for r in together[lane.name].curve],
            [r["loss"] for r in alone.curve],
            rtol=1e-5,
        )

    shapes = lora.lanes.padded_shapes([lane.spec for lane in lanes], base)
    slots = lora.lanes.empty_slots(base, shapes, 2)
    for i, lane in enumerate(lanes):
        adapters = together[lane.name].adapters
        slots = lora.lanes.put(
            slots, i, lora.lanes.pad(adapters, shapes), lora.lanes.scales(lane.spec, base, shapes)
        )
    tokens = np.random.default_rng(0).integers(1, 60, (2, 9)).astype(np.int32)
    got = model.apply(lora.lanes.of_rows(slots, [1, 0]), tokens)
    for row, lane in zip(got, lanes[::-1], strict=True):
        attached = lora.attach(dequantize_params(base), together[lane.name].adapters, lane.spec)
        np.testing.assert_allclose(
            row, model.apply(attached, tokens)[0 if lane is lanes[1] else 1], atol=1e-4
        )


@pytest.fixture(scope="module")
def beside_floats() -> dict[str, Any]:
    """Memory of the step beside a float base by remat: it is compiled once for all formats."""
    return {}


@pytest.mark.optimised  # the optimisations determine the memory of a program
@pytest.mark.parametrize(("format", "share"), [("int8", 0.27), ("nf4", 0.16)])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_step_holds_the_small_base_only(examples, beside_floats, format, share, remat):
    """The compiled program takes in a base of that share. Its temporaries exceed those beside a
    float base by no more than one layer's kernels, however many layers there are."""
    model = Decoder(WIDE)
    config = dataclasses.replace(CONFIG, batch_rows=1, remat=remat)
    abstract = model.abstract_params()
    batch = batches_of([examples], config, 1)[0]

    def compiled(params):
        task = Task.lora(model, params, config, make_mesh(), 6, SPEC)
        return task, compiling.memory_of(task.lower(batch))

    task, ours = compiled(jax.eval_shape(lambda p: quantize_params(p, format), abstract))
    if remat not in beside_floats:
        _, beside_floats[remat] = compiled(abstract)
    floats = beside_floats[remat]
    float_bytes = trees.n_bytes(kernels(abstract))
    assert trees.n_bytes(kernels(task.frozen)) <= share * float_bytes
    assert floats.argument_size_in_bytes - ours.argument_size_in_bytes >= (1 - share) * float_bytes
    assert ours.temp_size_in_bytes <= floats.temp_size_in_bytes + float_bytes / WIDE.n_layers


def test_what_needs_floats_is_refused_by_name(model, params, examples, tmp_path):
    base = quantize_params(params, "nf4")
    for run in (train, check_training):
        with pytest.raises(
            UserError, match="full fine-tuning needs kernels of floats, and these are stored in nf4"
        ):
            run(model, base, [examples], CONFIG)
    for spec, told in (
        (lora.Spec(dora=True), "dora=True"),
        (lora.Spec(init="pissa"), "init='pissa'"),
        (lora.Spec(init="olora"), "init='olora'"),
        (
            lora.Spec(targets="q_proj", trained="up_proj"),
            "trained='up_proj': 'layers/mlp/up_proj/kernel'",
        ),
    ):
        with pytest.raises(UserError, match=f"{told}.* quantised"):
            lora.abstract(spec, base)
    with pytest.raises(UserError, match="a folder of weights needs kernels of floats"):
        save(tmp_path / "out", model, base)


def test_a_checkpoint_is_of_one_format(model, params, examples):
    bases = (params, *(quantize_params(params, format) for format in FORMATS))
    assert len({fingerprint_of(model, base, [examples], CONFIG, SPEC) for base in bases}) == 3


def test_lanes_hold_one_quantised_base(model, params):
    base = quantize_params(params, "nf4")
    task = LaneTask.build(
        model, base, CONFIG, make_mesh(), lora.lanes.padded_shapes([SPEC], base), 2
    )
    assert trees.n_bytes(kernels(task.frozen)) == trees.n_bytes(kernels(base))


@pytest.mark.multiprocess
@pytest.mark.slow
def test_eight_devices_equal_one():
    script = Path(__file__).with_name("multidevice_quantized.py")
    assert on_eight_devices(script, optimised=True) == [
        "int8 is split with its scales",
        "int8 equals one device",
        "nf4 is split with its scales",
        "nf4 equals one device",
    ]
