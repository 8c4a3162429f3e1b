"""An experiment of a tenth of a second: what it returns follows from its settings, and it fails or
is preempted as often as it is told."""

from __future__ import annotations

import dataclasses
import os
import time

from absl import flags

from kafjax.core.command_line import define, from_flags
from kafjax.core.config import Config, option
from kafjax.core.config_record import read_record
from kafjax.core.errors import Preempted, UserError, run_main
from kafjax.core.paths import as_path
from kafjax.core.rundir import append_jsonl, open_run, read_jsonl, read_object, write_json


@dataclasses.dataclass(frozen=True)
class Toy(Config):
    rank: int = option(1, "A number.", least=1)
    lr: float = option(1e-3, "Another.", above=0)
    seed: int = option(0, "A third.", least=0)
    text: str = option("", "Text that a shell would read otherwise.")
    steps: int = option(1, "Steps of `seconds` each; each is saved.")
    seconds: float = option(0.0, "Of a step.")
    fails: int = option(0, "Starts that fail.")
    preempts: int = option(0, "Starts that end as SIGTERM ends them.")
    mesh: str = option("auto", "Does not matter.", identity=False)
    name: str | None = option(None, "Of the folder.", record=False)
    runs: str = option("runs", "Where it lies.", record=False, path=True, bucket=True)


def run(config: Toy) -> None:
    """Does what it is told. Of many processes the first does, and the others wait for it."""
    if os.environ.get("JAX_PROCESS_ID", "0") != "0":
        result = as_path(config.runs) / (config.name or "") / "result.json"
        while not result.exists():
            time.sleep(0.1)
        return
    run = open_run(as_path(config.runs), config.name, config, prefix="toy")
    seen = {
        "cores": sorted(os.sched_getaffinity(0)),
        "devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }
    append_jsonl(run.file("starts.jsonl"), {"began": time.time(), "pid": os.getpid(), **seen})
    starts = len(read_jsonl(run.file("starts.jsonl")))
    print(f"start {starts}", flush=True)
    if starts <= config.fails:
        raise UserError(f"told to fail at start {starts}")
    if starts <= config.fails + config.preempts:
        raise Preempted("told to be")
    steps = run.file("metrics.jsonl")
    for step in range(len(read_jsonl(steps)) if steps.exists() else 0, config.steps):
        time.sleep(config.seconds)
        run.log(step=step)
    result = {
        "final_loss": config.rank * config.lr + config.seed,
        "text": config.text,
        "ended": time.time(),
    }
    write_json(run.file("result.json"), result)


def main() -> None:
    define(Toy)

    def start(_: list[str]) -> None:
        file = as_path(flags.FLAGS.config)
        run(from_flags(Toy, read_record(Toy, read_object(file), file)))

    run_main(start)


if __name__ == "__main__":
    main()
