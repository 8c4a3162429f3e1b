"""Does it fit, and how fast can it be? Plans a training or a server on accelerators that are not
there.

    python -m experiments.plan_pod --model=llama3.1-8b --topology=v5p-32 --batch=32 --seq_len=2048 --remat=full
    python -m experiments.plan_pod --model=llama3.1-8b --method=lora --topology=v5e-16 --search
    python -m experiments.plan_pod --model=gemma3-27b --method=rag --topology=v6e-8 --batch=32 --seq_len=4096
    python -m experiments.plan_pod --model=llama3.1-8b --topology='2*v5p-32' --batch=64     two slices, data over the network
    python -m experiments.plan_pod --model=llama3.1-70b --topology=h100-64 --search         GPUs: by formula
    python -m experiments.plan_pod --method=search --vectors=21000000 --dimension=768 --topology=v5e-16     vectors of --engine=mesh-int8

For a TPU the very step that would run (of `finetune`, `sweep_lora`, or the prefill and the decode
loop of a server whose prompts carry retrieved passages) is compiled by the TPU's own compiler, with
abstract weights: nothing is downloaded, no TPU is needed, and it takes some minutes. That needs the
extra [tpu]. GPUs of another machine are planned by formula alone, and so is everything with
--formula.

The last line starts with `fits` or `does not fit`. --search ranks the meshes by formula and
compiles the best.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments import build, plan_search, pods
from experiments.configs.plan_pod import PlanPod
from kafjax import lora
from kafjax.core.errors import UserError
from kafjax.core.progress import waiting
from kafjax.core.rundir import read_object, write_json
from kafjax.models import Decoder, DecoderConfig, named
from kafjax.ops.attention import NAMES, kernel_for
from kafjax.parallel import make_mesh
from kafjax.parallel.chips import Slice, parse_slice
from kafjax.parallel.estimate import (
    Choice,
    Demand,
    Estimate,
    by_bytes,
    choose,
    estimate,
    obstacle,
    ranked,
    show,
)
from kafjax.parallel.hlo import bytes_by_kind
from kafjax.parallel.mesh import checked, parse
from kafjax.training import TrainConfig
from kafjax.training.demand import serving_demand, training_demand

N_SHOWN, N_TRIED = 8, 3  # meshes of a search that are shown, and compiled at most
N_LARGEST = 3  # collectives that are shown one by one
USABLE = 0.9  # of a device's memory, where only formulas tell


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program of a plan: what it asks for by formula, and how it is lowered for a
    mesh."""

    name: str
    demand: Demand
    lower: Callable[[jax.sharding.Mesh], jax.stages.Lowered]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Estimate of one program on one mesh. `compiled` is None where only formulas apply."""

    program: Program
    formula: Estimate
    compiled: pods.Compiled | None
    memory: float

    @property
    def n_bytes(self) -> float:
        return self.formula.n_bytes if self.compiled is None else self.compiled.n_bytes

    @property
    def fits(self) -> bool:
        return self.n_bytes <= USABLE * self.memory if self.compiled is None else self.compiled.fits


def programs(
    model: Decoder, method: str, config: TrainConfig, rank: int, lanes: int
) -> list[Program]:
    """Lists the programs that a method runs on the devices. The mesh is chosen for the last one."""
    rows, length = config.batch_rows, config.seq_len
    spec = lora.Spec(rank)
    if method == "full":
        lower = functools.partial(pods.lower_training, model, config, spec=None)
        return [Program("a step", training_demand(model, config), lower)]
    if method == "lora":
        lower = functools.partial(pods.lower_training, model, config, spec=spec)
        return [Program("a step", training_demand(model, config, spec), lower)]
    if method == "lanes":
        lower = functools.partial(pods.lower_lanes, model, config, spec=spec, lanes=lanes)
        return [
            Program(f"a step of {lanes} lanes", training_demand(model, config, spec, lanes), lower)
        ]
    prefill = functools.partial(pods.lower_prefill, model, rows=rows, length=length)
    decode = functools.partial(pods.lower_decode, model, rows=rows, slots=length)
    return [
        Program("prefill", serving_demand(model, rows, 0, length), prefill),
        Program("a token of each reply", serving_demand(model, rows, length, 1), decode),
    ]


def judge(
    program: Program, sizes: dict[str, int], pod: Slice, devices: list[Any] | None
) -> Verdict:
    formula = estimate(program.demand, sizes, pod.device, pod.n_slices)
    if devices is None:
        return Verdict(program, formula, None, pod.device.memory)
    with waiting("plan", f"compiling {program.name} for {pod.name} on {show(sizes, pod.n_slices)}"):
        compiled = pods.compiled(lambda: program.lower(mesh=make_mesh(sizes, devices)))
    if not pod.is_tpu and compiled.n_bytes > pod.device.memory:  # a GPU's compiler does not refuse
        compiled = dataclasses.replace(compiled, refusal="it needs more memory than the GPU has")
    return Verdict(program, formula, compiled, compiled.limit or pod.device.memory)


def report(verdict: Verdict, pod: Slice) -> dict[str, Any]:
    """Prints what is known of a program, and returns it."""
    program, formula, compiled, chip = (
        verdict.program,
        verdict.formula,
        verdict.compiled,
        pod.device,
    )
    d, seconds = program.demand, dict(verdict.formula.seconds)
    print(f"\n{program.name}")
    figures: dict[str, Any] = {
        "program": program.name,
        "fits": verdict.fits,
        "bytes": verdict.n_bytes,
        "formula_bytes": formula.n_bytes,
    }
    if compiled is None:
        print(
            f"  memory       {formula.n_bytes / 1e9:.2f} GB a device by formula: {by_bytes(formula.memory)}"
        )
    elif compiled.refusal:
        print(f"  compiler     refused after {compiled.seconds:.0f} s: {compiled.refusal}")
    else:
        parts = {
            "arguments": compiled.arguments,
            "temporaries": compiled.temporaries,
            "outputs": compiled.outputs,
        }
        host = f"; {compiled.host / 1e9:.2f} GB on the host" if compiled.host else ""
        print(
            f"  HBM          {by_bytes(parts)} ({compiled.aliased / 1e9:.2f} GB of them in the place of arguments){host}"
        )
        print(
            f"               {compiled.n_bytes / 1e9:.2f} GB a device at once; {formula.n_bytes / 1e9:.2f} GB by formula"
        )
        kinds = bytes_by_kind(compiled.collectives)
        for i, (kind, row) in enumerate(kinds.items()):
            label = "" if i else "collectives"
            print(
                f"  {label:<12} {row['count']:.0f} x {kind}, {row['bytes'] / 1e9:.2f} GB; a device sends {row['sent'] / 1e9:.2f} GB"
            )
        most = sorted(compiled.collectives, key=lambda c: -c.sent)[:N_LARGEST]
        print(
            "\n".join(
                f"  {'' if i else 'most sent by':<12} {c.times} x {c.kind} {c.shape} among {c.group}"
                for i, c in enumerate(most)
            )
        )
        figures["most_sent_by"] = [dataclasses.asdict(c) | {"sent": c.sent} for c in most]
        seconds["links"] = sum(row["sent"] for row in kinds.values()) / chip.link_bandwidth
        figures |= {
            "hbm": parts | {"aliased": compiled.aliased, "host": compiled.host},
            "collectives": kinds,
        }
    if compiled is not None:
        figures |= {
            "compile_seconds": compiled.seconds,
            "flops_loops_once": compiled.flops_once * pod.n_devices,
        }
    step, bound = max(seconds.values()), max(seconds, key=seconds.get)
    mfu = d.model_flops / (pod.n_devices * chip.flops * step)
    print(
        f"  FLOPs        {d.model_flops:.3g} of the model, {d.flops:.3g} with what is computed again or masked (by formula)"
    )
    print(
        f"  bytes        {formula.seconds['memory'] * chip.memory_bandwidth / 1e9:.1f} GB read and written a device (by formula)"
    )
    times = ", ".join(f"{name} {value * 1e3:.3g} ms" for name, value in seconds.items())
    print(f"  roofline     {times}: {step * 1e3:.3g} ms or more, bound by {bound}")
    print(f"  at best      {d.rows * d.seq_len / step:,.0f} tokens/s, MFU {100 * mfu:.0f}%")
    return figures | {
        "model_flops": d.model_flops,
        "flops": d.flops,
        "seconds": seconds,
        "step_seconds": step,
        "mfu": mfu,
    }


def remedies(
    asked: PlanPod, model: Decoder, config: TrainConfig, pod: Slice, sizes: dict[str, int]
) -> list[str]:
    """Flags that would make it fit, by formula: on this mesh more remat and more parts, then a
    smaller state, then another mesh."""
    method = asked.method

    def need(config: TrainConfig, sizes: dict[str, int]) -> float:
        """Bytes of a device, or infinity where something does not divide."""
        demands = [
            program.demand for program in programs(model, method, config, asked.rank, asked.lanes)
        ]
        divides = not any(obstacle(demand, sizes) for demand in demands)
        return (
            max(estimate(demand, sizes, pod.device, pod.n_slices).n_bytes for demand in demands)
            if divides
            else math.inf
        )

    found: list[str] = []

    def first(
        candidates: Iterable[dict[str, Any]],
        sizes: dict[str, int] = sizes,
        mesh: dict[str, str] | None = None,
    ) -> None:
        for changes in candidates:
            changed = {
                name: value for name, value in changes.items() if value != getattr(config, name)
            }
            n_bytes = need(dataclasses.replace(config, **changed), sizes)
            if n_bytes <= USABLE * pod.device.memory:
                shown = {**changed, **(mesh or {})}
                found.append(
                    f"{' '.join(f'--{name}={value}' for name, value in shown.items())} ({n_bytes / 1e9:.1f} GB)"
                )
                return

    parts = [config.accumulate * n for n in (1, 2, 4, 8, 16, 32)]
    if method != "rag":
        first({"accumulate": n} for n in parts[1:])
        if config.remat != "full":
            first({"remat": "full", "accumulate": n} for n in parts)
    if method == "full":
        small = [
            {"param_dtype": "bfloat16", "remat": "full", "optimizer": name}
            for name in ("adamw", "adafactor")
        ]
        first({**changes, "accumulate": n} for changes in small for n in parts)
    if not found:
        with contextlib.suppress(UserError):  # no mesh divides at all
            demand = programs(model, method, config, asked.rank, asked.lanes)[-1].demand
            best = ranked(demand, pod.n_devices, pod.device, n_slices=pod.n_slices)[0].sizes
            first([{}], best, {"mesh": show(best, pod.n_slices)})
    return found or ["a smaller --batch, or a larger --topology"]


def run(asked: PlanPod) -> None:
    """Prints the plan, and writes it where `--json` says. Raises `UserError` for what cannot be
    planned."""
    if asked.topology is None:
        raise UserError("say on what: --topology=v5e-16, for instance (--help lists the forms)")
    pod = parse_slice(asked.topology)
    if pod.is_tpu:
        # compiling takes no TPU, and one that is here may be at work
        jax.config.update("jax_platforms", "cpu")
    if asked.method == "search":
        devices = None if asked.formula else pods.devices_of(pod)
        return plan_search.run_search(asked, pod, devices, _judge_name(pod, devices))
    # lanes leave attention to XLA (`LaneTask`)
    platform = "tpu" if pod.is_tpu else "gpu"
    kernel = "xla" if asked.method == "lanes" else kernel_for("auto", platform)
    model = Decoder(_config(asked.model), dtype=jnp.bfloat16, attention=kernel)
    config = TrainConfig(
        batch_rows=asked.batch,
        seq_len=asked.seq_len,
        accumulate=asked.accumulate,
        optimizer=asked.optimizer,
        param_dtype=asked.param_dtype,
        remat=asked.remat,
        freeze_embedding=asked.method != "full",
    )
    planned = programs(model, asked.method, config, asked.rank, asked.lanes)
    demand = planned[-1].demand
    candidates, reason = _meshes(asked, demand, pod)
    for sizes in candidates:
        if problem := next(
            (p for program in planned if (p := obstacle(program.demand, sizes))), None
        ):
            raise UserError(problem)
    devices = None if asked.formula else pods.devices_of(pod)

    what = f"{asked.method} of {asked.model} on {pod.name}: {pod.n_chips} chips, {pod.n_devices} devices"
    print(
        f"{what}, batch {asked.batch} x {asked.seq_len} tokens, remat {asked.remat}, computed in bfloat16"
    )
    print(f"mesh {reason}")
    in_ring = "; by XLA round a ring where sequence splits the tokens" if pod.is_tpu else ""
    print(f"attention by {NAMES[kernel]}{in_ring}")
    print(f"judged by {_judge_name(pod, devices)}")
    for sizes in candidates:
        verdicts = [judge(program, sizes, pod, devices) for program in planned]
        if all(verdict.fits for verdict in verdicts):
            break
    if len(candidates) > 1:
        print(f"\nmesh {show(sizes, pod.n_slices)} of these")
    figures = [report(verdict, pod) for verdict in verdicts]
    worst = max(verdicts, key=lambda verdict: (not verdict.fits, verdict.n_bytes))
    if asked.json is not None:
        flag_values = {
            name: getattr(asked, name)
            for name in ("model", "method", "topology", "batch", "seq_len", "remat", "accumulate")
        }
        found = {
            "mesh": show(sizes, pod.n_slices),
            "judge": _judge_name(pod, devices),
            "programs": figures,
        }
        write_json(Path(asked.json), {**flag_values, **found})
    held = f"{worst.n_bytes / 1e9:.1f} of {worst.memory / 1e9:.1f} GB a device on {show(sizes, pod.n_slices)}"
    by = "" if devices is not None else " by formula"
    print()
    if worst.fits:
        print(f"fits{by}: {held}")
    else:
        print(
            f"does not fit{by}: {held}; by formula would: {', '.join(remedies(asked, model, config, pod, sizes))}"
        )


def _config(name: str) -> DecoderConfig:
    file = Path(name) / "config.json"
    return DecoderConfig.from_hf(read_object(file)) if file.exists() else named(name)


def _meshes(asked: PlanPod, demand: Demand, pod: Slice) -> tuple[list[dict[str, int]], str]:
    """Sizes to judge, in order, and what to say of them."""
    if asked.search:
        if asked.mesh != "auto":
            raise UserError("--search looks at all meshes; leave --mesh out")
        choices = ranked(demand, pod.n_devices, pod.device, n_slices=pod.n_slices)
        lines = "\n".join(
            _row(i + 1, choice, pod.n_slices) for i, choice in enumerate(choices[:N_SHOWN])
        )
        return [
            choice.sizes for choice in choices[:N_TRIED]
        ], f"by formula, best first of {len(choices)} that divide:\n{lines}"
    if asked.mesh == "auto":
        sizes, reason = choose(demand, pod.n_devices, pod.device, pod.n_slices)
        return [sizes], f"{show(sizes, pod.n_slices)}: {reason}"
    sizes = checked(parse(asked.mesh), pod.n_devices, pod.n_slices)
    return [sizes], f"{show(sizes, pod.n_slices)}: as asked for"


def _row(place: int, choice: Choice, n_slices: int) -> str:
    e = choice.estimate
    times = ", ".join(f"{name} {1e3 * seconds:.3g}" for name, seconds in e.seconds.items())
    fits = "fits" if choice.fits else "too much"
    return f"  {place}. {show(choice.sizes, n_slices):<32} {e.n_bytes / 1e9:8.1f} GB {fits:<8}  ms: {times}"


def _judge_name(pod: Slice, devices: list[Any] | None) -> str:
    if devices is None:
        return "formula alone"
    return (
        f"the compiler of libtpu {importlib.metadata.version('libtpu')}"
        if pod.is_tpu
        else "the compiler of the GPUs of this machine"
    )


def main() -> None:
    build.start(PlanPod, run)


if __name__ == "__main__":
    main()
