"""The formulas that choose a mesh and judge a pod, against programs that were compiled and against
each other."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
import pytest

from kafjax import lora
from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.models import CONFIGS, Decoder, DecoderConfig
from kafjax.parallel import AXES, make_mesh
from kafjax.parallel.chips import CHIPS
from kafjax.parallel.estimate import choose, estimate, meshes, obstacle, ranked, show
from kafjax.training import Batches, TrainConfig
from kafjax.training.demand import serving_demand, training_demand
from kafjax.training.task import Task
from tests.training.conftest import random_example

LLAMA = Decoder(CONFIGS["llama3.1-8b"])
TRAIN = TrainConfig(batch_rows=32, seq_len=2048, remat="full", freeze_embedding=False)
V5P = CHIPS["v5p"]

# Wide enough that products are nearly all of the work.
WIDE = Decoder(
    DecoderConfig(
        vocab_size=512,
        hidden_size=128,
        mlp_size=256,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=32,
        sliding=(False, False),
        window=None,
    )
)


@pytest.mark.parametrize(
    ("method", "remat"), [("full", "none"), ("full", "full"), ("lora", "none")]
)
def test_flops_are_those_of_the_unrolled_program(method, remat):
    """XLA counts a loop once, so the program that is counted has its layers unrolled; the loss is
    counted place by place."""
    config = TrainConfig(batch_rows=4, seq_len=64, remat=remat, freeze_embedding=False)
    rng = np.random.default_rng(0)
    examples = [
        dataclasses.replace(random_example(rng, 65), weights=np.ones(65, np.float32))
        for _ in range(4)
    ]
    batch = Batches([examples], seq_len=64, batch_rows=4, epochs=1)[0]
    model, params, mesh = (
        dataclasses.replace(WIDE, unroll=True),
        WIDE.abstract_params(),
        make_mesh(),
    )
    spec = lora.Spec(8) if method == "lora" else None
    task = (
        Task.full(model, params, config, mesh, 1)
        if spec is None
        else Task.lora(model, params, config, mesh, 1, spec)
    )
    without_loss, a_place = task.flops(batch)
    counted = without_loss + a_place * batch.places_SxN.size
    demand = training_demand(WIDE, config, spec)
    assert demand.flops == pytest.approx(counted, rel=0.06)
    assert demand.model_flops < demand.flops


def test_of_experts_all_are_held_and_a_few_computed_with():
    dense = Decoder(dataclasses.replace(WIDE.config, mlp_size=2 * WIDE.config.mlp_size))
    experts = Decoder(dataclasses.replace(WIDE.config, n_experts=8, experts_per_token=2))
    config = TrainConfig(batch_rows=4, seq_len=64)
    few, many = training_demand(dense, config), training_demand(experts, config)
    router = 2 * 128 * 8  # layers, hidden size, experts
    assert many.flops - few.flops == 6 * router * 4 * 64
    n = trees.count(experts.abstract_params()) - trees.count(dense.abstract_params())
    assert many.kernels - few.kernels == 4 * n and n == router + (8 - 2) * 2 * 3 * 128 * 256
    many = training_demand(experts, dataclasses.replace(config, batch_rows=16))
    assert obstacle(many, {"fsdp": 16}) == "mesh axis fsdp:16 does not divide n_experts=8"


def test_memory_of_the_state_is_exact():
    demand = training_demand(LLAMA, TRAIN)
    n = trees.count(LLAMA.abstract_params())
    assert demand.state == 12 * n  # float32 master weights and two float32 moments
    assert training_demand(LLAMA, dataclasses.replace(TRAIN, param_dtype="bfloat16")).state == 8 * n
    assert training_demand(LLAMA, dataclasses.replace(TRAIN, optimizer="muon")).state == 8 * n
    adapter = training_demand(LLAMA, TRAIN, lora.Spec(16))
    assert adapter.state == 12 * sum(
        x.size for x in jax.tree.leaves(lora.abstract(lora.Spec(16), LLAMA.abstract_params()))
    )
    assert adapter.frozen >= 2 * n


def test_every_mesh_is_dealt_once_and_divides():
    demand = training_demand(LLAMA, TRAIN)
    found = list(meshes(demand, 16))
    assert len({tuple(sizes.values()) for sizes in found}) == len(found) > 10
    for sizes in found:
        assert math.prod(sizes.values()) == 16 and set(sizes) == set(AXES) and sizes["lane"] == 1
        assert obstacle(demand, sizes) is None
    assert obstacle(demand, {"tensor": 16}) == "mesh axis tensor:16 does not divide n_kv_heads=8"
    assert "use a multiple of 64" in obstacle(demand, {"data": 64})


def test_lanes_take_an_axis_of_their_own():
    demand = training_demand(
        LLAMA, dataclasses.replace(TRAIN, batch_rows=2), lora.Spec(16), lanes=8
    )
    assert {sizes["lane"] for sizes in meshes(demand, 16)} == {1, 2, 4, 8}
    assert obstacle(demand, {"lane": 16}) == "mesh axis lane:16 does not divide lanes=8"
    alone, split = (estimate(demand, {"lane": n}, V5P) for n in (1, 8))
    assert split.seconds["compute"] == pytest.approx(alone.seconds["compute"] / 8)
    assert split.seconds["links"] == 0  # lanes send each other nothing
    base = demand.frozen
    state = "parameters and optimizer"
    # the base is there on each device
    assert split.memory[state] - base == pytest.approx((alone.memory[state] - base) / 8)


def test_what_fits_goes_first_and_by_time():
    choices = ranked(training_demand(LLAMA, TRAIN), 16, V5P)
    fits = [choice.fits for choice in choices]
    assert fits == sorted(fits, reverse=True) and fits[0]
    seconds = [choice.estimate.step_seconds for choice in choices if choice.fits]
    assert seconds == sorted(seconds)


def test_less_is_kept_with_more_remat_and_parts_and_devices():
    def need(sizes, **changes):
        return estimate(
            training_demand(LLAMA, dataclasses.replace(TRAIN, **changes)), sizes, V5P
        ).n_bytes

    by_remat = [need({"fsdp": 16}, remat=remat) for remat in ("none", "dots", "full", "offload")]
    assert by_remat == sorted(by_remat, reverse=True) and len(set(by_remat)) == 4
    assert need({"fsdp": 16}, accumulate=2) < need({"fsdp": 16})
    assert need({"fsdp": 32}) < need({"fsdp": 16}) < need({"data": 2, "fsdp": 8})


def test_the_reason_names_what_decides():
    sizes, reason = choose(training_demand(LLAMA, TRAIN), 16, V5P)
    assert show(sizes) != "data:1" and "fastest by formula" in reason and "bound by" in reason
    assert choose(training_demand(LLAMA, TRAIN), 1, V5P)[1] == "one device"
    _, reason = choose(training_demand(LLAMA, TRAIN), 2, V5P)
    assert reason.startswith("none of") and "comes nearest" in reason
    with pytest.raises(
        UserError, match="no mesh of 7 devices divides this step: batch=32 rows do not divide"
    ):
        choose(training_demand(LLAMA, TRAIN), 7, V5P)


def test_serving_reads_weights_and_cache_at_every_token():
    rows, past = 32, 2048
    c = LLAMA.config
    decode = serving_demand(dataclasses.replace(LLAMA, dtype="bfloat16"), rows, past, 1)
    cache = 2 * c.n_layers * rows * (past + 1) * c.n_kv_heads * c.head_dim * 2
    found = estimate(decode, {"tensor": 8}, V5P)
    # the loop may work on a copy
    assert found.memory["kept activations"] == pytest.approx(2 * cache / 8)
    weights = 2 * trees.count(LLAMA.abstract_params())
    assert found.seconds["memory"] > 0.85 * (weights + cache) / 8 / V5P.memory_bandwidth
    assert max(found.seconds, key=found.seconds.get) == "memory"
    prefill = serving_demand(dataclasses.replace(LLAMA, dtype="bfloat16"), rows, 0, past)
    assert prefill.model_flops == pytest.approx(rows * past * 2 * 7.5e9, rel=0.1)
