"""Compares ways to give a language model the knowledge of a corpus, on one set of questions and one bill.

    python -m experiments.compare                                    all eight methods on invented biographies
    python -m experiments.compare --profile=smoke                    the same with fewer people, a few minutes on two cores
    python -m experiments.compare --methods=base,rag --corpus=DIR    two methods on your own documents (FlashRAG's format)
    python -m experiments.compare --methods=full,lora --replay=0.5   does mixing in other matters soften forgetting?
    python -m experiments.compare --rank=4 --name=rank4              one thing changed, in a folder of its own
    python -m experiments.compare --mesh=fsdp:4,tensor:2             a model spread over eight devices of this host

Methods: base (the model as it came), oracle (an answering passage in the prompt), rag, hyde, lora, full, lora+rag, full+rag. Rows appear
as methods finish. The run's folder, runs/NAME, holds config.json, metrics.jsonl, predictions.jsonl, results.json, table.md,
figures and report.html. The same command again goes on where a broken run stopped.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from pathlib import Path

from absl import flags

from experiments import common
from experiments.comparison import clear_finished, load_arm, run_arm, save_arm, select, write_results
from kafjax.core.errors import run_main
from kafjax.core.progress import say
from kafjax.core.rundir import config_hash, environment, find_run, open_run
from kafjax.evaluation import table
from kafjax.methods import METHODS
from kafjax.training.checksum import weights_hash

# What differs from the flags' own defaults. `default` is made for two cores and twenty minutes.
PROFILES = {
    "smoke": {"subjects": 4, "attributes": 3, "retention": 6, "held_out": 2, "epochs": 5, "latency_queries": 1},
    "default": {},
    "large": {"subjects": 200, "attributes": 6, "retention": 70, "held_out": 40, "batch_rows": 8, "latency_queries": 100},
}

common.define_model_flags()
common.define_corpus_flags()
common.define_settings_flags()
common.define_mesh_flag()
flags.adopt_module_key_flags(common)  # so that --help shows them
flags.DEFINE_list("methods", list(METHODS), "Methods to compare, separated by commas.")
flags.DEFINE_enum("profile", "default", list(PROFILES), "Size of the comparison; flags given explicitly win over it.")
flags.DEFINE_integer("latency_queries", 12, "Queries asked one at a time to measure the latency.", lower_bound=0)
flags.DEFINE_string("name", None, "Name of the run's folder (default: the profile and a hash of the configuration).")
flags.DEFINE_string("runs", "runs", "Folder that runs are written to.")


def main(_: list[str]) -> None:
    values = flags.FLAGS
    began = time.monotonic()
    common.apply_profile(PROFILES[values.profile])
    names = select(values.methods)
    settings = common.settings_from_flags()
    corpus = common.corpus_from_flags()
    config = {**common.config_from_flags("latency_queries"), **common.corpus_identity(corpus)}
    where = Path(values.runs), values.name or f"{values.profile}-{config_hash(config)}", config
    lab = common.open_lab(find_run(*where), corpus, settings)
    for name in names:
        METHODS[name](lab).check()
    run = open_run(*where)  # only now: a command that is refused leaves nothing behind
    command = shlex.join(["python", "-m", "experiments.compare", *sys.argv[1:]])
    counts = f"{len(corpus.documents)} documents, {len(corpus.passages)} passages, {len(corpus.questions)} questions"
    say("compare", f"{corpus.name}: {counts}, {len(corpus.retention)} on other matters; writing to {run.path}")
    clear_finished(run)
    code = environment() | {"weights": weights_hash(lab.params)}
    arms = {name: arm for name in names if (arm := load_arm(run, name)) is not None}
    for name in arms:
        say(name, "finished earlier")
    while pending := [name for name in names if name not in arms]:
        if arms:
            results = write_results(run, lab, names, arms, code, command)
            so_far = dataclasses.replace(table.quality_table(results), notes=())  # the notes come with the whole table
            print(f"\n{table.to_markdown(so_far)}", flush=True)
        arm = run_arm(lab, pending[0], values.latency_queries, arms.get("base"))
        arms[pending[0]] = dataclasses.replace(arm, environment=code)
        save_arm(run, pending[0], arms[pending[0]])
    results = write_results(run, lab, names, arms, code, command)
    print(f"\n{table.render(table.main_tables(results), [*table.setting(results), *table.method_notes(results)])}")
    highest = max(arm.cost.peak_memory_bytes or 0 for arm in arms.values())
    say("compare", f"{time.monotonic() - began:.0f} s, at most {highest / 1e9:.1f} GB")
    print(f"Look at {run.path}/report.html, or at {run.path}/predictions.jsonl for every answer.")
    print("Next: change one thing, say --replay=0.5 or --k=1, give it a --name, and compare the tables.")


if __name__ == "__main__":
    run_main(main)
