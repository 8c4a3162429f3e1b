"""Plans a search over vectors on accelerators that are not there: what `plan_pod --method=search`
does.

The vectors lie spread over all devices (`retrieval.mesh_index`). For each batch of queries a device
reads all of its vectors once, chooses its best, and sends k scores with their rows to the others.
Reading bounds the time as long as a batch is small.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import pods
from experiments.configs.plan_pod import PlanPod
from kafjax.core.progress import waiting
from kafjax.core.rundir import write_json
from kafjax.parallel.chips import Slice
from kafjax.parallel.estimate import Estimate, by_bytes
from kafjax.parallel.hlo import bytes_by_kind
from kafjax.retrieval import mesh_index

USABLE = 0.9  # of a device's memory, where only formulas tell


def search_estimate(
    count: int, dimension: int, dtype: str, queries: int, k: int, pod: Slice
) -> Estimate:
    """Bytes and seconds of a batch of queries on each device.

    Vectors are read once a batch; float32 products run at a sixth of the bfloat16 rate (six passes,
    as `Precision.HIGHEST` asks for). A TPU's compiler fuses the choice into the product; elsewhere
    scores are written and read once. Of the merge each device receives k scores and rows of every
    other.
    """
    n, chip = pod.n_devices, pod.device
    held = mesh_index.planned_bytes(count, dimension, dtype, n)
    rows = mesh_index.capacity(count, n) // n
    scores = 0 if pod.is_tpu else 4 * queries * rows
    memory = {"vectors": held, "scores": scores}
    flops = 2 * queries * rows * dimension * (6 if dtype == "float32" else 1)
    merged = 8 * queries * k * (n - 1)
    between = chip.link_bandwidth if pod.n_slices == 1 else chip.network_bandwidth
    seconds = {
        "compute": flops / chip.flops,
        "memory": (held + 2 * scores) / chip.memory_bandwidth,
        "links" if pod.n_slices == 1 else "network": merged / between,
    }
    return Estimate(memory, seconds)


def lower(
    devices: list[Any], count: int, dimension: int, dtype: str, queries: int, k: int
) -> jax.stages.Lowered:
    """The very search of `MeshIndex`, with abstract vectors."""
    mesh = mesh_index.mesh_of(devices)
    C = mesh_index.capacity(count, len(devices))
    split, whole = (
        jax.sharding.NamedSharding(mesh, spec)
        for spec in (jax.sharding.PartitionSpec(mesh.axis_names[0]), jax.sharding.PartitionSpec())
    )
    stored = mesh_index.DTYPES[dtype]
    return mesh_index.top_k.lower(
        mesh,
        jax.ShapeDtypeStruct((C, dimension), stored, sharding=split),
        jax.ShapeDtypeStruct((C,), jnp.float32, sharding=split),
        jax.ShapeDtypeStruct((queries, dimension), jnp.float32, sharding=whole),
        jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        k,
    )


def run_search(asked: PlanPod, pod: Slice, devices: list[Any] | None, judge: str) -> None:
    """Prints the plan of a search, and writes it where `--json` says. `devices` are those to
    compile for; None: by formula alone."""
    shape = (asked.vectors, asked.dimension, asked.stored, asked.batch, asked.k)
    formula = search_estimate(*shape, pod)
    told = mesh_index.planned(asked.vectors, asked.dimension, asked.stored, pod.n_devices)
    print(f"search on {pod.name}: {pod.n_chips} chips, {pod.n_devices} devices")
    print(f"{told}; batches of {asked.batch} queries, k = {asked.k}\njudged by {judge}\n")
    figures: dict[str, Any] = {"formula": dataclasses.asdict(formula)}
    n_bytes, limit = formula.n_bytes, USABLE * pod.device.memory
    print(f"  memory       {by_bytes(formula.memory)} a device, by formula")
    seconds, fits = dict(formula.seconds), n_bytes <= limit
    if devices is not None:
        with waiting("plan", f"compiling the search for {pod.name}"):
            found = pods.compiled(lambda: lower(devices, *shape))
        n_bytes, limit = found.n_bytes, found.limit or pod.device.memory
        fits = found.fits and n_bytes <= limit
        if found.refusal:
            print(f"  compiler     refused after {found.seconds:.0f} s: {found.refusal}")
        else:
            parts = ("arguments", "temporaries", "outputs")
            hbm = {part: getattr(found, part) for part in parts}
            print(f"  HBM          {by_bytes(hbm)} a device, compiled in {found.seconds:.0f} s")
            kinds = bytes_by_kind(found.collectives)
            for kind, row in kinds.items():
                print(
                    f"  collectives  {row['count']:.0f} x {kind}; a device sends {row['sent'] / 1e3:.0f} kB"
                )
            figures |= {"hbm": hbm, "collectives": kinds, "compile_seconds": found.seconds}
    step, bound = formula.step_seconds, max(seconds, key=seconds.__getitem__)
    read = formula.seconds["memory"] * pod.device.memory_bandwidth
    print(f"  bytes        {read / 1e9:.2f} GB read and written a device and batch (by formula)")
    times = ", ".join(f"{name} {value * 1e3:.3g} ms" for name, value in seconds.items())
    print(f"  roofline     {times}: {step * 1e3:.3g} ms a batch or more, bound by {bound}")
    print(f"  at best      {asked.batch / step:,.0f} queries/s")
    figures |= {"bytes": n_bytes, "fits": fits, "batch_seconds": step, "bound": bound}
    if asked.json is not None:
        names = ("method", "topology", "vectors", "dimension", "stored", "batch", "k")
        asked_for = {name: getattr(asked, name) for name in names}
        write_json(Path(asked.json), {**asked_for, "judge": judge, **figures})
    held = f"{n_bytes / 1e9:.2f} of {pod.device.memory / 1e9:.1f} GB a device"
    by = "" if devices is not None else " by formula"
    more = "" if fits else f"; {_remedy(asked, pod)}"
    print(f"\n{'fits' if fits else 'does not fit'}{by}: {held}{more}")


def _remedy(asked: PlanPod, pod: Slice) -> str:
    """Names what would fit, by formula: a smaller type, then fewer queries at a time, then more
    devices."""
    usable = USABLE * pod.device.memory

    def need(dtype: str, batch: int) -> float:
        of = search_estimate(asked.vectors, asked.dimension, dtype, batch, asked.k, pod)
        return of.n_bytes

    itemsize = {name: np.dtype(dtype).itemsize for name, dtype in mesh_index.DTYPES.items()}
    for dtype in mesh_index.DTYPES:
        if itemsize[dtype] < itemsize[asked.stored] and need(dtype, asked.batch) <= usable:
            return f"by formula would: --stored={dtype}"
    batch = asked.batch
    while batch > 1:
        batch //= 2
        if need(asked.stored, batch) <= usable:
            return f"by formula would: --batch={batch}"
    return "take a larger --topology"
