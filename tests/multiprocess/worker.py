"""One of the processes that the tests start: `--do=ACTION,FOLDER,...`. What they have to compare
lies in FOLDER."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from kafjax import lora
from kafjax.core import trees
from kafjax.core.errors import UserError, run_main
from kafjax.models import Decoder
from kafjax.parallel import distributed, make_mesh, watchdog
from kafjax.training import Example, TrainConfig, train
from tests.multiprocess.launch import STALLED_STEPS
from tests.shapes import DIVISIBLE

MODEL = Decoder(DIVISIBLE)
TRAIN = TrainConfig(steps=6, batch_rows=8, seq_len=16, learning_rate=3e-3)
SPEC = lora.Spec(rank=4, alpha=8)
KINDS = {"full": (TRAIN, None), "lora": (dataclasses.replace(TRAIN, accumulate=2), SPEC)}


def examples() -> list[Example]:
    rng = np.random.default_rng(0)
    return [
        Example(
            rng.integers(1, 64, n).astype(np.int32), (np.arange(n) >= n // 3).astype(np.float32)
        )
        for n in rng.integers(2, 15, 60)
    ]


def learn(
    folder: Path, name: str, config: TrainConfig, spec: lora.Spec | None, mesh: str, **options
) -> None:
    """Trains, and leaves curve and trained weights in the folder."""
    params = jax.jit(MODEL.init)(jax.random.key(0))
    result = train(
        MODEL,
        params,
        [examples()],
        config,
        spec=spec,
        mesh=make_mesh(mesh.replace("/", ",")),
        label=name,
        **options,
    )
    arrays = distributed.to_host(trees.flatten(result.trainable))
    if distributed.is_main():
        flat = {
            jax.tree_util.keystr(path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)
        }
        np.savez(folder / f"{name}.npz", **flat)
        (folder / f"{name}.json").write_text(json.dumps(result.curve))


def learned(folder: Path, mesh: str, *kinds: str) -> None:
    for kind in kinds:
        learn(folder, kind, *KINDS[kind], mesh)


def resume(folder: Path, mesh: str, kind: str, stop_after: str) -> None:
    """Saves after every step, and stops after step `stop_after` with an error, if it gets there."""
    config, spec = KINDS[kind]

    def log(**row) -> None:
        if row["step"] == int(stop_after):
            raise UserError("far enough")

    learn(
        folder,
        kind,
        dataclasses.replace(config, checkpoint_every=1),
        spec,
        mesh,
        run_dir=folder,
        log=log,
    )


def stall(folder: Path, mesh: str) -> None:
    """Sleeps long enough to be stopped in the middle."""
    watchdog.STALL_SECONDS = 1.0
    learn(
        folder,
        "stalled",
        dataclasses.replace(TRAIN, steps=STALLED_STEPS),
        SPEC,
        mesh,
        run_dir=folder,
        log=lambda **row: _pace(folder, **row),
    )


def _pace(folder: Path, **row) -> None:
    (folder / "step").write_text(str(row["step"]))
    time.sleep(0.03)


def meet(folder: Path) -> None:
    """Every process tells the others its number."""
    numbers = multihost_utils.process_allgather(np.int32(jax.process_index()))
    print(
        f"{jax.process_index()} of {jax.process_count()}: {numbers.tolist()}, main {distributed.is_main()}"
    )


def fail(folder: Path) -> None:
    """Process 1 cannot go on; the others wait for it."""
    distributed.wait_for_all("start")
    if jax.process_index() == 1:
        raise UserError("the disk of this host is full")
    distributed.wait_for_all("never")


ACTIONS = {
    "learn": learned,
    "resume": resume,
    "stall": stall,
    "meet": meet,
    "fail": fail,
    "alone": fail,
}


def _main(_: list[str]) -> None:
    action, folder, *rest = flags.FLAGS.do
    with distributed.processes(timeout_seconds=5 if action == "alone" else 60):
        ACTIONS[action](Path(folder), *rest)


if __name__ == "__main__":
    flags.DEFINE_list("do", None, "Action, folder, and what else the action wants.")
    run_main(_main)
