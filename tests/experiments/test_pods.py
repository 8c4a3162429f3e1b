"""Compilation of tiny models by the TPU's own compiler, on a machine without a TPU (`make
test-tpu`: libtpu has a venv of its own)."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from experiments import plan_search, pods
from experiments.build import pin_precision
from kafjax.core import trees
from kafjax.models import Decoder, DecoderConfig, named
from kafjax.parallel import make_mesh
from kafjax.parallel.chips import parse_slice
from kafjax.parallel.estimate import estimate, ranked
from kafjax.parallel.hlo import collectives
from kafjax.training import TrainConfig
from kafjax.training.demand import training_demand

pytestmark = [pytest.mark.tpu_aot, pytest.mark.slow]

MODEL = Decoder(
    DecoderConfig(
        vocab_size=512,
        hidden_size=256,
        mlp_size=512,
        n_layers=3,
        n_heads=8,
        n_kv_heads=8,
        head_dim=64,
        sliding=(False,) * 3,
        window=None,
    ),
    dtype=jnp.bfloat16,
)
TRAIN = TrainConfig(batch_rows=8, seq_len=128, freeze_embedding=False, remat="full")


@pytest.mark.parametrize(
    "name", ["v4-16", "v5e-8", "v5p-16", "v6e-8", "v5e-1", "v5p:2x4x4", "v7x-8"]
)
def test_the_compiler_knows_the_slices(name):
    pod = parse_slice(name)
    devices = pods.devices_of(pod)
    assert len(devices) == pod.n_devices
    assert {device.platform for device in devices} == {"tpu"}


@pytest.mark.parametrize(
    "name", ["v4-64", "v5e-256", "v5p-128", "v6e-256", "v7x-64", "2*v5e-16", "2*v5p-32"]
)
def test_every_mesh_ranked_first_is_laid_out_on_the_coordinates_that_libtpu_gives(name):
    pod = parse_slice(name)
    devices = pods.devices_of(pod)
    for model in ("llama3.1-8b", "gemma3-27b"):
        config = TrainConfig(batch_rows=1024, seq_len=2048, remat="full", freeze_embedding=False)
        demand = training_demand(Decoder(named(model), dtype=jnp.bfloat16), config)
        for choice in ranked(demand, pod.n_devices, pod.device, n_slices=pod.n_slices)[:20]:
            mesh = make_mesh(choice.sizes, devices)
            assert len({device.id for device in mesh.devices.flat}) == pod.n_devices


def test_a_step_on_two_slices_gathers_within_each_and_only_adds_up_between_them():
    pod = parse_slice("2*v5e-4")
    mesh = make_mesh("data:2x1,fsdp:4", pods.devices_of(pod))
    program = pods.lower_training(MODEL, TRAIN, mesh, None).compile()
    text = program.as_text()
    assert {c.group for c in collectives(text)} == {4}  # of a slice
    between = [
        line for line in text.splitlines() if " send(" in line and "xla_megascale_runtime" in line
    ]
    assert between and all('rendezvous="all-reduce' in line for line in between)
    assert (
        estimate(training_demand(MODEL, TRAIN), {"data": 2, "fsdp": 4}, pod.device, 2).seconds[
            "network"
        ]
        > 0
    )


def test_products_of_float32_are_not_rounded_to_bfloat16_on_a_tpu():
    pin_precision()
    pod = parse_slice("v5e-1")
    model = dataclasses.replace(MODEL, dtype=jnp.float32)
    text = pods.lower_training(model, TRAIN, make_mesh({}, pods.devices_of(pod)), None).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) > 10 and all("HIGHEST" in line for line in products)


def test_fsdp_gathers_a_kernel_at_a_time_and_state_is_split_exactly():
    pod = parse_slice("v5e-8")
    mesh = make_mesh("fsdp:8", pods.devices_of(pod))
    program = pods.lower_training(MODEL, TRAIN, mesh, None).compile()
    demand = training_demand(MODEL, TRAIN)
    arguments = program.memory_analysis().argument_size_in_bytes
    assert demand.state / 8 <= arguments < 1.02 * demand.state / 8 + 100_000
    sent = collectives(program.as_text())
    params = MODEL.abstract_params()
    layer = 2 * trees.count(params["layers"]) / MODEL.config.n_layers
    embedding = 2 * params["embed"]["embedding"].size
    in_loops = [c for c in sent if c.times == MODEL.config.n_layers]
    assert in_loops and max(c.largest for c in in_loops if c.kind == "all-gather") < layer
    assert max(c.largest for c in sent if c.kind == "all-gather") <= max(layer, embedding)
    assert estimate(demand, {"fsdp": 8}, pod.device).seconds["links"] > 0


def test_what_does_not_fit_is_refused_with_figures():
    pod = parse_slice("v5e-1")
    config = TrainConfig(batch_rows=4096, seq_len=2048, freeze_embedding=False, remat="full")
    found = pods.compiled(
        lambda: pods.lower_training(MODEL, config, make_mesh({}, pods.devices_of(pod)), None)
    )
    assert not found.fits
    assert found.used > found.limit > 15e9
    assert "hbm" in found.refusal.lower()


@pytest.mark.parametrize("method", ["full", "lora", "lanes", "rag"])
def test_every_method_is_compiled_as_it_would_run(plan_pod, world, tmp_path, method):
    file = tmp_path / "plan.json"
    outcome = plan_pod(
        *(
            f"--model={world.gemma}",
            f"--method={method}",
            "--topology=v5e-4",
            "--batch=4",
            "--seq_len=64",
            "--lanes=2",
            f"--json={file}",
        )
    )
    assert outcome.code == 0, outcome.err
    assert outcome.out.rstrip().splitlines()[-1].startswith("fits: ")
    assert "judged by the compiler of libtpu" in outcome.out
    for program in json.loads(file.read_text())["programs"]:
        hbm = program["hbm"]
        assert (
            program["bytes"]
            == sum(hbm[part] for part in ("arguments", "temporaries", "outputs")) - hbm["aliased"]
        )
        # what a step changes lies in the place of what it was
        assert hbm["aliased"] > 0 or program["program"] == "prefill"


def test_layers_kept_on_the_host_leave_the_device():
    pod = parse_slice("v5e-1")
    devices = pods.devices_of(pod)
    on = {}
    for remat in ("full", "offload"):
        config = TrainConfig(batch_rows=64, seq_len=256, freeze_embedding=False, remat=remat)
        on[remat] = pods.compiled(
            lambda config=config: pods.lower_training(MODEL, config, make_mesh({}, devices), None)
        )
    kept = MODEL.config.n_layers * 64 * 256 * MODEL.config.hidden_size * 2
    assert on["full"].host == 0 and on["offload"].host >= kept
    assert on["offload"].temporaries < on["full"].temporaries
    assert jax.default_backend() == "cpu"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_search_fuses_the_choice_into_the_product_and_sends_one_gather_of_k(dtype):
    pod = parse_slice("v5e-16")
    shape = (1_000_000, 256, dtype, 64, 10)
    program = plan_search.lower(pods.devices_of(pod), *shape).compile()
    text, memory = program.as_text(), program.memory_analysis()
    assert text.count('custom_call_target="PartialReduce"') == 1
    (merge,) = collectives(text)
    assert (merge.kind, merge.group, merge.times) == ("all-gather", 16, 1)
    assert merge.n_bytes == 16 * 2 * 4 * 64 * 10  # a score and a row, k of each query and device
    held = plan_search.search_estimate(*shape, pod).memory["vectors"]
    assert held <= memory.argument_size_in_bytes < 1.01 * held + 200_000
    # the scores, [64, vectors of a device] float32, are nowhere
    assert memory.temp_size_in_bytes < 0.5 * 4 * 64 * 1_000_000 / 16


SLIDING = dataclasses.replace(
    MODEL.config, sliding=(True, False, True), window=128, n_kv_heads=2, attention_cap=30.0
)


@pytest.mark.parametrize(("topology", "head_dim"), [("v5e-4", 64), ("v5p-8", 256), ("v6e-4", 128)])
def test_attention_is_the_splash_kernel_and_keeps_no_scores(topology, head_dim):
    """Layers that slide and layers that do not, in one scan, split over rows and heads, with the
    precision that every main pins."""
    pin_precision()
    pod = parse_slice(topology)
    mesh = make_mesh("fsdp:2,tensor:2", pods.devices_of(pod))
    # so long that one array of scores would be more than all that grows with the tokens
    config = dataclasses.replace(TRAIN, batch_rows=2, seq_len=4096)
    model = Decoder(dataclasses.replace(SLIDING, head_dim=head_dim), dtype=jnp.bfloat16)
    program = pods.lower_training(model, config, mesh, None).compile()
    # forward, forward again, gradients of queries and of keys; of either kind of layer
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 8
    scores = (
        4 * config.seq_len**2 * SLIDING.n_heads // 2
    )  # of the one row and the heads of a device
    assert program.memory_analysis().temp_size_in_bytes < scores


def test_32k_tokens_of_a_row_go_round_a_ring():
    pod = parse_slice("v5p-8")
    mesh = make_mesh("sequence:4", pods.devices_of(pod))
    config = dataclasses.replace(TRAIN, batch_rows=1, seq_len=32_768)
    program = pods.lower_training(MODEL, config, mesh, None).compile()
    shape = MODEL.config
    keys = 2 * config.seq_len // 4 * shape.n_kv_heads * shape.head_dim  # of a device, bfloat16
    sent = [c for c in collectives(program.as_text()) if c.kind == "collective-permute"]
    assert {keys} <= {c.n_bytes for c in sent}
    scores = 4 * (config.seq_len // 4) * config.seq_len * shape.n_heads
    assert program.memory_analysis().temp_size_in_bytes < scores / 8
