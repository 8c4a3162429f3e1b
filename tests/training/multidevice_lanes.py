"""Run by test_multidevice.py in a process of its own, with eight fake devices."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import PartitionSpec

from kafjax import lora
from kafjax.core.errors import UserError
from kafjax.parallel import make_mesh
from kafjax.training import TrainConfig
from kafjax.training.lane import Lane
from kafjax.training.lane_step import LaneTask
from kafjax.training.lanes import train_lanes
from tests.training.multidevice_train import MODEL, examples

CONFIG = TrainConfig(steps=4, batch_rows=4, seq_len=16, loss_chunk=8)
LANES = [
    Lane(f"lane{i}", lora.Spec(rank, 8.0, targets), 1e-3 * (i + 1), seed=i % 3)
    for i, (rank, targets) in enumerate(
        [
            (1, "_proj"),
            (4, "q_proj"),
            (2, "_proj"),
            (8, "(up|down)_proj"),
            (3, "_proj"),
            (5, "_proj"),
        ]
    )
]


def main() -> None:
    assert jax.device_count() == 8
    params = jax.jit(MODEL.init)(jax.random.key(0))
    one = train_lanes(
        MODEL, params, [examples()], CONFIG, LANES, mesh=make_mesh({}, devices=jax.devices()[:1])
    )
    for spec, slots in (("lane:8", 8), ("lane:2,data:2,fsdp:2", 4), ("lane:4,tensor:2", 4)):
        mesh = make_mesh(spec)
        many = train_lanes(MODEL, params, [examples()], CONFIG, LANES, mesh=mesh, slots=slots)
        for lane in LANES:
            np.testing.assert_allclose(
                [row["loss"] for row in many[lane.name].curve],
                [row["loss"] for row in one[lane.name].curve],
                rtol=1e-5,
            )
        print(f"{spec} equals one device", flush=True)

    mesh = make_mesh("lane:4,tensor:2")
    task = LaneTask.build(
        MODEL, params, CONFIG, mesh, lora.lanes.padded_shapes([lora.Spec(8)], params), 8
    )
    a = task.empty().trainable["layers/mlp/up_proj/kernel"]["b"]
    assert a.sharding.spec == PartitionSpec("lane", None, None, "tensor"), a.sharding
    assert {shard.data.shape for shard in a.addressable_shards} == {(2, 2, 8, 12)}
    print("lanes are split, and not copied", flush=True)

    try:
        train_lanes(MODEL, params, [examples()], CONFIG, LANES, mesh=mesh, slots=6)
    except UserError as error:
        assert "6 lanes do not divide over mesh axis lane:4" in str(error), error
        print("lanes that do not divide are told", flush=True)


if __name__ == "__main__":
    main()
