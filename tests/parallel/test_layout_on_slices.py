"""Meshes on the coordinates of real slices. The devices are stand-ins that say where they are, as
JAX's own do; see also `tests/experiments/test_pods.py`, where libtpu's own descriptions of the same
slices are laid out."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from kafjax.core.errors import UserError
from kafjax.models import named
from kafjax.models.decoder import Decoder
from kafjax.parallel import make_mesh
from kafjax.parallel.chips import parse_slice
from kafjax.parallel.estimate import choose, estimate, ranked, show
from kafjax.parallel.mesh import parse
from kafjax.training import TrainConfig
from kafjax.training.demand import training_demand

KINDS = {
    "v4": "TPU v4",
    "v5e": "TPU v5 lite",
    "v5p": "TPU v5",
    "v6e": "TPU v6 lite",
    "v7x": "TPU7x",
}


@dataclasses.dataclass(frozen=True)
class Standin:
    """A TPU core as `mesh_utils` sees it: where it is, of which slice and process."""

    id: int
    coords: tuple[int, ...]
    core_on_chip: int
    slice_index: int
    device_kind: str
    process_index: int
    platform: str = "tpu"


def devices_of(name: str) -> list[Standin]:
    pod = parse_slice(name)
    kind = next(kind for kind in KINDS if kind in name)
    shape = (*pod.shape, *[1] * (3 - len(pod.shape)))
    cores = pod.chip.devices
    made = []
    for number in range(pod.n_slices):
        for z, y, x in itertools.product(*map(range, reversed(shape))):
            for core in range(cores):
                process = number * 10_000 + (x // 2) + 100 * (y // 2) + 10_000 * z
                made.append(Standin(len(made), (x, y, z), core, number, KINDS[kind], process))
    return made


SLICES = [
    "v4-16",
    "v4-64",
    "v5e-8",
    "v5e-16",
    "v5e-64",
    "v5e-256",
    "v5p-16",
    "v5p-32",
    "v5p-128",
    "v6e-16",
    "v6e-64",
    "v6e-256",
]
SEVERAL = ["2*v5e-16", "4*v5p-32", "2*v6e-256"]


@pytest.mark.parametrize("name", [*SLICES, *SEVERAL])
def test_every_mesh_that_is_chosen_or_ranked_first_is_laid_out_with_each_device_once(name):
    pod, devices = parse_slice(name), devices_of(name)
    laid_out = 0
    for model, batch in itertools.product(("llama3.1-8b", "gemma3-27b"), (256, 1024)):
        decoder = Decoder(named(model))
        demand = training_demand(
            decoder,
            TrainConfig(batch_rows=batch, seq_len=2048, remat="full", freeze_embedding=False),
        )
        best = [
            choice.sizes
            for choice in ranked(demand, pod.n_devices, pod.device, n_slices=pod.n_slices)[:8]
        ]
        sizes, _ = choose(demand, pod.n_devices, pod.device, pod.n_slices)
        assert sizes == best[0]
        for sizes in best:
            mesh = make_mesh(sizes, devices)
            assert {axis: mesh.shape[axis] for axis in sizes} == sizes
            assert sorted(device.id for device in mesh.devices.flat) == list(range(len(devices)))
            laid_out += 1
            if pod.n_slices > 1:  # no axis but data leaves a slice
                number = np.vectorize(lambda device: device.slice_index)(mesh.devices)
                within = sizes["data"] // pod.n_slices
                for start in range(0, sizes["data"], within):
                    assert len(np.unique(number[:, start : start + within])) == 1
    assert laid_out >= 8


def test_slices_that_data_does_not_split_are_refused_and_data_may_be_written_as_slices_by_devices():
    devices = devices_of("2*v5e-16")
    assert parse("data:2x4,fsdp:4") == {"data": 8, "fsdp": 4}
    assert make_mesh("data:2x4,fsdp:4", devices).shape["data"] == 8
    assert make_mesh("auto", devices).shape == {
        "lane": 1,
        "data": 2,
        "fsdp": 16,
        "sequence": 1,
        "tensor": 1,
    }
    for spec in ("fsdp:32", "data:1,fsdp:32"):
        with pytest.raises(
            UserError,
            match="does not split 2 slices, between which only data may lie; write data:2x1",
        ):
            make_mesh(spec, devices)
    with pytest.raises(UserError, match="is not of the form axis:size"):
        parse("fsdp:2x4")
    assert show({"data": 8, "fsdp": 4}, 2) == "data:2x4,fsdp:4"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("0*v5e-16", "write the number of slices first"),
        ("x*v5e-16", "write the number"),
        ("2*h100-8", "GPUs come in no slices"),
    ],
)
def test_slices_that_are_none_are_told(name, told):
    with pytest.raises(UserError, match=told):
        parse_slice(name)


def test_the_network_bounds_a_step_of_two_slices_and_not_of_one():
    decoder = Decoder(named("llama3.1-8b"))
    demand = training_demand(
        decoder, TrainConfig(batch_rows=64, seq_len=2048, remat="full", freeze_embedding=False)
    )
    one, two = parse_slice("v5e-16"), parse_slice("2*v5e-16")
    assert (two.n_devices, two.shape) == (32, one.shape)
    sizes = {"data": 2, "fsdp": 16}
    assert "network" not in estimate(demand, sizes, two.device).seconds
    seconds = estimate(demand, sizes, two.device, 2).seconds
    # Each device has a sixteenth of the gradients, and sends as much as that over the network (a
    # ring of two: 2 x 1/2).
    assert seconds["network"] == pytest.approx(demand.reduced / 16 / two.device.network_bandwidth)
    assert seconds["network"] > estimate(demand, sizes, two.device).seconds["links"]
