from __future__ import annotations

import jax
import pytest
from jax.sharding import AxisType

from kafjax.core.errors import UserError
from kafjax.parallel import AXES, make_mesh, n_data_shares
from kafjax.parallel.mesh import parse


@pytest.mark.parametrize("spec", ["auto", "", "data:1", {"tensor": 1}])
def test_one_device_is_the_trivial_mesh(spec):
    mesh = make_mesh(spec, jax.devices()[:1])
    assert dict(mesh.shape) == dict.fromkeys(AXES, 1)
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert n_data_shares(mesh) == 1


def test_parse():
    assert parse("data:2, fsdp:16,") == {"data": 2, "fsdp": 16}


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("data:2", r"data:2 is 2 devices, there are 1: choose sizes among its divisors 1$"),
        ("batch:1", r"axis 'batch' does not exist"),
        ("fsdpp:1", r"Did you mean 'fsdp'\?"),
        ("data", r"'data' is not of the form axis:size"),
        ("data:x", r"'data:x' is not of the form axis:size"),
        ("data:-1", r"'data:-1' is not of the form axis:size"),
        ("data:1,data:1", r"axis 'data' is named twice"),
        ("data:0", r"data=0: sizes start at 1"),
    ],
)
def test_a_mesh_that_cannot_be_is_told(spec, told):
    with pytest.raises(UserError, match=told):
        make_mesh(spec, jax.devices()[:1])
