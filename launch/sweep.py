"""Runs a sweep: workers race for what is open, here and on other machines, until all is done.

    python -m launch.sweep rank_rate_seed --dry_run                what it is: a line a run, with estimates; writes nothing
    python -m launch.sweep rank_rate_seed --set=corpus=DIR         a shipped sweep on your own documents, in sweeps/rank_rate_seed
    python -m launch.sweep my.yaml --folder=/shared/mine           your own spec; the same line on any machine adds a worker
    python -m launch.sweep my.yaml --cores_per_run=4               as many runs at a time as the cores hold
    python -m launch.sweep my.yaml --devices=0,1,2,3               four runs at a time, a GPU each
    python -m launch.sweep --folder=/shared/mine --watch           the table, from any machine that sees the folder

Specs are Python or YAML (launch/spec.py). A run is known by the hash of its configuration, without
mesh, machine and folder: what is done is skipped, what broke goes on where it was. A failed run is
tried again --retries times; a preempted one (exit code 143) does not count. A worker that dies is
noticed after --lease_seconds, and its run is taken over. SIGTERM and Ctrl-C save what runs and
leave it open. docs/launch.md has more.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import jax
from absl import flags

from kafjax.core.command_line import arguments_of, define, from_flags
from kafjax.core.errors import Preempted, UserError, run_main
from kafjax.core.paths import as_path, is_address
from kafjax.core.progress import LINE_SECONDS, Progress
from kafjax.core.rundir import environment, read_object, write_atomic
from kafjax.evaluation import table
from kafjax.parallel.chips import parse_slice
from kafjax.parallel.place import find_place
from kafjax.training.forecast import show_seconds
from launch import packs
from launch.config import Launch
from launch.engines import jobset, queued, slurm
from launch.engines.ray import RayPool
from launch.engines.ray_slices import SlicePool
from launch.ledger import DONE, FAILED, PENDING, PREEMPTED, RUNNING, Ledger, State
from launch.load import name_of, open_spec
from launch.spec import Run
from launch.worker import Pool, follow, slots

if TYPE_CHECKING:
    from launch import estimate

_ORDER = (DONE, RUNNING, FAILED, PENDING)


def run(config: Launch) -> None:
    """Runs, shows or estimates a sweep.

    Raises:
      UserError: anything that the user can mend, before the first file is written wherever it can
        be known; or runs have failed.
      Preempted: SIGTERM came; the runs of this process have saved and are open.
    """
    ledger = open_ledger(config)
    if config.dry_run:
        print(dry_run(ledger, config))
    elif config.watch:
        watch(ledger, config)
    elif config.only is not None:
        run_one(ledger, config)
    elif config.engine == "local":
        race(ledger, config)
    else:
        slots(config)  # refuses what this machine does not have
        if config.engine != "ray":
            print(prepare(ledger, config))
            return
        ledger.create()
        work(ledger, config, _ray_pool(ledger, config))


def race(ledger: Ledger, config: Launch) -> None:
    """Runs what is open, beside any other worker, until all is done. Raises as `work` does."""
    places = slots(config)
    ledger.create()
    shared = packs.programs(ledger.runs) if config.lanes > 1 and not config.launcher else {}
    sha = environment()["git_sha"]
    work(ledger, config, Pool(ledger, config, places, sha, programs=shared))


def _ray_pool(ledger: Ledger, config: Launch) -> RayPool | SlicePool:
    arguments = worker_arguments(config)
    if config.topology is None:
        return RayPool(ledger, config, Path.cwd(), arguments)
    return SlicePool(ledger, config, parse_slice(config.topology), Path.cwd(), arguments)


def open_ledger(config: Launch) -> Ledger:
    """Opens the sweep that a spec describes or a folder holds. Writes nothing."""
    if config.spec is None:
        if config.folder is None:
            raise UserError("give a SPEC, such as rank_rate_seed, or the --folder of a sweep")
        if config.set:
            raise UserError("--set changes a spec: give that, too")
        return Ledger.read(as_path(config.folder))
    sweep = open_spec(config.spec, config.set)
    folder = as_path(config.folder or Path("sweeps") / name_of(config.spec))
    ledger = Ledger(folder, sweep.runs())
    ledger.check()
    if is_address(folder):
        _check_bucket(ledger)
    return ledger


def _check_bucket(ledger: Ledger) -> None:
    """Raises `UserError` for experiments that write to folders of this machine only."""
    others = {run.module for run in ledger.runs if run.module.startswith("experiments.")}
    if others := sorted(others - {"experiments.compare", "experiments.finetune"}):
        raise UserError(
            f"{others[0]} does not write to buckets, and {ledger.folder} is in one; "
            "give a --folder of this machine, or one where the bucket is mounted"
        )


def prepare(ledger: Ledger, config: Launch) -> str:
    """Writes what another engine starts workers by, into the sweep's folder. Returns the line that
    submits it.

    Raises:
      UserError: settings that the engine needs and lacks.
    """
    arguments = worker_arguments(config)
    left = [run for run in ledger.runs if ledger.state(run, config.retries).name != DONE]
    if config.engine == "queued":
        return _queued(ledger, left, config, arguments)
    if config.engine == "slurm":
        if is_address(ledger.folder):
            raise UserError(
                f"--engine=slurm writes its script and logs beside the runs, and {ledger.folder} is in a bucket; "
                "give a --folder that the nodes share"
            )
        name, submit = "sweep.sbatch", "sbatch"
        text = slurm.script(ledger.folder, Path.cwd(), config.workers, arguments)
    else:
        if config.topology is None:
            raise UserError(
                "--engine=jobset needs --topology, such as v5e-16: the slices of one run"
            )
        name, submit = "jobset.yaml", "kubectl apply -f"
        topology = parse_slice(config.topology)
        text = jobset.manifests(ledger.folder, left, config, topology, arguments)
        if is_address(ledger.folder) and topology.n_slices == 1:
            lines = jobset.submissions(ledger.folder, left, config, topology, arguments)
            other = _here(ledger) / "gcluster.sh"
            write_atomic(other, lines)
            submit = f"sh {shlex.quote(str(other))}, or {submit}"
    file = _here(ledger) / name
    ledger.create()
    write_atomic(file, text)
    return f"Next: {submit} {shlex.quote(str(file))}"


def _here(ledger: Ledger) -> Path:
    """Returns the folder for files that are submitted from this machine."""
    return Path("sweeps") / ledger.folder.name if is_address(ledger.folder) else ledger.folder


def _queued(ledger: Ledger, left: Sequence[Run], config: Launch, arguments: Sequence[str]) -> str:
    if config.topology is None:
        raise UserError("--engine=queued needs --topology, such as v5e-16: the slice of one run")
    made = queued.scripts(ledger.folder, left, config, parse_slice(config.topology), arguments)
    ledger.create()
    for name, text in made.items():
        write_atomic(_here(ledger) / name, text)
    return f"Next: bash {shlex.quote(str(_here(ledger) / 'queued.sh'))}"


def worker_arguments(config: Launch) -> list[str]:
    """Lists the flags that a worker elsewhere takes over."""
    kept = (
        "cores",
        "cores_per_run",
        "devices",
        "devices_per_run",
        "lanes",
        "retries",
        "fail_fast",
        "lease_seconds",
        "launcher",
    )
    return arguments_of(Launch, {name: getattr(config, name) for name in kept})


def work(ledger: Ledger, config: Launch, pool: Pool | RayPool | SlicePool) -> None:
    """Runs the pool under a bar until nothing is open. SIGTERM and Ctrl-C end it, and leave what it
    was at to others."""
    came: list[int] = []

    def end(number: int, _: FrameType | None) -> None:
        came.append(number)
        pool.stop()

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with Progress(
            "sweep", len(ledger.runs), done=_count(ledger, config)[DONE], unit="run"
        ) as bar:
            shown = _count(ledger, config)[DONE]

            def show() -> None:
                nonlocal shown
                counts = _count(ledger, config)
                bar.advance(
                    counts[DONE] - shown,
                    ", ".join(f"{counts[name]} {name}" for name in _ORDER if counts[name]),
                )
                shown = counts[DONE]

            pool.run(show)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if signal.SIGINT in came:
        raise KeyboardInterrupt
    if came:
        raise Preempted(f"runs of {ledger.folder} have saved; the same command goes on")
    print(render(ledger, config))
    counts = _count(ledger, config)
    if counts[FAILED]:
        raise UserError(
            f"{counts[FAILED]} of {len(ledger.runs)} runs failed; mend what they say, and raise --retries to try them again"
        )
    if counts[DONE] == len(ledger.runs):
        print(f"Next: python -m experiments.report --folder={ledger.run_folders}")


def run_one(ledger: Ledger, config: Launch) -> None:
    """Runs one run once. Of many processes the first keeps the ledger, and the others only start
    the run.

    Raises:
      UserError: there is no such run, or it failed.
      Preempted: it saved and is open.
    """
    runs = [run for run in ledger.runs if run.id == config.only]
    if not runs:
        raise UserError(f"--only={config.only[:60]}: {ledger.folder} has no such run")
    place = find_place(os.environ)
    if place is not None and place.process_id > 0:
        sys.exit(follow(ledger, runs[0], config))
    ledger = Ledger(ledger.folder, runs)
    work(ledger, config, Pool(ledger, config, slots(config)[:1], environment()["git_sha"]))
    state = ledger.state(runs[0], config.retries)
    if (
        state.name != DONE
        and state.attempts
        and (outcome := state.attempts[-1].outcome) is not None
    ):
        if outcome.how == PREEMPTED:
            raise Preempted(f"run {config.only} has saved; the same command goes on")
        raise UserError(f"run {config.only} failed: {outcome.last_line}")


def watch(ledger: Ledger, config: Launch) -> None:
    """Shows the table until nothing is open any more: redrawn in place on a terminal, else when it
    has changed."""
    shown = ""
    while True:
        text = render(ledger, config)
        if sys.stdout.isatty():
            print(f"\033[H\033[2J{text}", flush=True)
        elif text != shown:
            print(text, flush=True)
        shown = text
        counts = _count(ledger, config)
        if not counts[PENDING] and not counts[RUNNING]:
            return
        time.sleep(1.0 if sys.stdout.isatty() else LINE_SECONDS)


def render(
    ledger: Ledger,
    config: Launch,
    costs: Mapping[str, estimate.Cost] | None = None,
    programs: Mapping[str, str] | None = None,
) -> str:
    """Writes a line a run: its settings, where it stands, and with `costs` what it takes. `programs`
    marks runs that will share one."""
    settings = list(dict.fromkeys(name for run in ledger.runs for name in run.settings))
    headers = (
        "run",
        *settings,
        "state",
        "who, or why",
        *(("program",) if programs else ()),
        *(("TFLOP", "tokens", "GB a device", "seconds", "by") if costs else ()),
    )
    rows = []
    for run in ledger.runs:
        state = ledger.state(run, config.retries)
        values = (
            _shown(run.settings[name]) if name in run.settings else table.NONE for name in settings
        )
        rows.append(
            (
                run.id,
                *values,
                state.name,
                state.told,
                *((programs.get(run.id, table.NONE),) if programs else ()),
                *(_cost_cells(costs[run.id]) if costs else ()),
            )
        )
    counts = _count(ledger, config)
    note = f"{len(ledger.runs)} runs: " + ", ".join(
        f"{counts[name]} {name}" for name in _ORDER if counts[name]
    )
    return table.to_markdown(table.Table(str(ledger.folder), headers, tuple(rows), (f"{note}.",)))


def dry_run(ledger: Ledger, config: Launch) -> str:
    """Writes the table with estimates, their sum over what is left, and what else there is to know
    before it starts."""
    from launch import estimate  # it imports the experiments, which a worker only starts

    topology = parse_slice(config.topology) if config.topology else None
    states = {run.id: ledger.state(run, config.retries) for run in ledger.runs}
    costs = estimate.costs(ledger.runs, states, topology)
    left = [costs[run.id] for run in ledger.runs if states[run.id].name != DONE]
    lines = [f"{len(left)} of {len(ledger.runs)} runs are left."]
    if all(cost.flops for cost in left) and left:
        lines.append(
            f"Their trainings take {table.number(sum(cost.flops for cost in left) / 1e12)} TFLOP"
        )
        lines[-1] += f" on {sum(cost.tokens for cost in left):,.0f} tokens, by formula."
    if left and all(cost.seconds is not None for cost in left):
        seconds = sum(cost.seconds for cost in left)
        lines.append(f"One after the other that is {show_seconds(seconds)}" + (
            f", {table.number(seconds / 3600 * topology.n_chips)} accelerator-hours."
            if topology
            else "."
        ))  # fmt: skip
    elif left:
        lines.append(
            "How long they take is known once one is done, or for a --topology by formula."
        )
    shared = _shared(ledger, states, config)
    lines += _packed(shared, costs, config)
    lines += _code_differences(states) + _weights_differences(ledger, states)
    return "\n".join([render(ledger, config, costs, shared), *lines])


def _shared(ledger: Ledger, states: Mapping[str, State], config: Launch) -> dict[str, str]:
    """Names the program of each run that will share one: 1, 2, ..."""
    shared = packs.programs(ledger.runs) if config.lanes > 1 and not config.launcher else {}
    names: dict[str, str] = {}
    return {
        run.id: names.setdefault(shared[run.id], str(len(names) + 1))
        for run in ledger.runs
        if states[run.id].name not in (DONE, FAILED) and shared.get(run.id, run.id) != run.id
    }


def _packed(
    shared: Mapping[str, str], costs: Mapping[str, estimate.Cost], config: Launch
) -> list[str]:
    """Says how many programs the runs that share one come to, and what that saves."""
    lines, n_saved = [], 0
    for name, n_runs in Counter(shared.values()).items():
        n = -(-n_runs // config.lanes)
        n_saved += n_runs - n
        lines.append(
            f"Program {name}: {n_runs} runs, {n} start{'s' * (n > 1)} of up to {config.lanes} lanes."
        )
    if n_saved:
        weights = next((c.base_bytes for c in costs.values() if c.base_bytes), 0)
        lines.append(
            f"Sharing saves {n_saved} compilations and as many copies of the base"
            + (f" of {table.number(weights / 1e9)} GB" if weights else "")
            + " (--lanes=1: each run alone)."
        )
    return lines


def _code_differences(states: Mapping[str, State]) -> list[str]:
    """Says which finished runs were computed by other code than is here."""
    here = environment()["git_sha"]
    ended = [state.attempts[-1].outcome for state in states.values() if state.name == DONE]
    others = Counter(
        outcome.git_sha for outcome in ended if outcome is not None and outcome.git_sha != here
    )
    return [
        f"{n} runs were computed by commit {sha}, and this is {here}." for sha, n in others.items()
    ]


def _weights_differences(ledger: Ledger, states: Mapping[str, State]) -> list[str]:
    """Says if finished trainings began from different weights under one name."""
    files = [
        ledger.run_folders / id / "result.json"
        for id, state in states.items()
        if state.name == DONE
    ]
    noted = (read_object(file).get("environment") for file in files if file.exists())
    found = Counter(of_run.get("weights") for of_run in noted if isinstance(of_run, dict))
    shown = ", ".join(f"{n} from {weights}" for weights, n in found.items())
    return [f"Finished runs began from different weights: {shown}."] if len(found) > 1 else []


def _count(ledger: Ledger, config: Launch) -> Counter[str]:
    return Counter(ledger.state(run, config.retries).name for run in ledger.runs)


def _cost_cells(cost: estimate.Cost) -> tuple[str, ...]:
    scaled = [
        None if value is None else value / unit
        for value, unit in ((cost.flops, 1e12), (cost.tokens, 1), (cost.memory, 1e9))
    ]
    return (*map(table.number, scaled), table.number(cost.seconds), cost.source or table.NONE)


def _shown(value: object) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def main() -> None:
    # only formulas are computed in this process: the accelerators are for the runs
    jax.config.update("jax_platforms", "cpu")
    define(Launch)
    flags.FLAGS.set_gnu_getopt(True)  # flags may stand behind the spec

    def start(argv: list[str]) -> None:
        config = from_flags(Launch)
        if len(argv) > 1 and config.spec is not None:
            raise UserError(f"two specs, '{argv[1]}' and --spec={config.spec}; give one")
        run(dataclasses.replace(config, spec=argv[1]) if len(argv) > 1 else config)

    run_main(start, most_arguments=1)


if __name__ == "__main__":
    main()
