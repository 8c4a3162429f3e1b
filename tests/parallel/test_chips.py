from __future__ import annotations

import math

import pytest

from kafjax.core.errors import UserError
from kafjax.parallel.chips import CHIPS, parse_slice


@pytest.mark.parametrize(
    ("name", "chips", "devices", "shape"),
    [
        ("v5e-16", 16, 16, (4, 4)),
        ("v5litepod-8", 8, 8, (2, 4)),
        ("v5p-32", 16, 16, (2, 2, 4)),  # counted in cores
        ("v5p-256", 128, 128, (4, 4, 8)),
        ("v4-8", 4, 4, (2, 2, 1)),
        ("v6e-64", 64, 64, (8, 8)),
        ("v6e-1", 1, 1, (1, 1)),
        ("v5p:2x2x2", 8, 8, (2, 2, 2)),
        ("tpu7x-64", 64, 128, (4, 4, 4)),  # two devices a chip
        ("h100-8", 8, 8, ()),
    ],
)
def test_slices_by_the_names_that_clouds_use(name, chips, devices, shape):
    pod = parse_slice(name)
    assert (pod.n_chips, pod.n_devices, pod.shape) == (chips, devices, shape)
    assert not shape or math.prod(shape) == chips
    assert pod.device.memory * devices == pod.chip.memory * chips


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("v5e-17", r"v5e-N counts chips. Did you mean 'v5e-16'\?"),
        ("v5p-33", r"v5p-N counts cores. Did you mean 'v5p-32'\?"),
        ("v5x-16", r"unknown topology 'v5x-16'. Did you mean"),
        ("tpu", "unknown topology 'tpu'"),
        ("", "For example v5e-16"),
        ("v5p:4x4", "v5p is a torus of 3 dimensions"),
        ("h100:2x2", "h100 has no torus; write h100-8"),
        ("v5e-4x4", "a shape is written v5e:4x4"),
        ("v5e:4x0", "torus of 2 dimensions"),
    ],
)
def test_an_unknown_slice_gets_the_nearest(name, told):
    with pytest.raises(UserError, match=told):
        parse_slice(name)


@pytest.mark.parametrize("kind", CHIPS)
def test_numbers_of_chips_are_plausible(kind):
    """Guards against a slip in a unit: a chip reads its memory in 5 to 100 ms, computes 100 to 600
    FLOPs for a byte read."""
    chip = CHIPS[kind]
    assert 0.005 < chip.memory / chip.memory_bandwidth < 0.1
    assert 100 < chip.flops / chip.memory_bandwidth < 600
    assert 2 < chip.memory_bandwidth / chip.link_bandwidth < 20
