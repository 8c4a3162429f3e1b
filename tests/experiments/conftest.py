"""The experiments as a user starts them, on tiny models in folders."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import compiling, tiny
from tests.experiments.commands import ROOT, SETTINGS, Command, Outcome, World


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    world = World(tmp_path_factory.mktemp("world"))
    tiny.write_gemma(world.gemma)
    tiny.write_bert(world.bert)
    tiny.write_corpus(world.corpus)
    return world


@pytest.fixture(scope="session")
def environment(kafjax_cache) -> dict[str, str]:
    return compiling.environment()


EXPERIMENTS = ("answer", "build_index", "compare", "evolve", "finetune", "plan_pod", "sweep_lora")
SCRIPTS = ("export", "pack_rows")
MAINS = {
    **{name: f"experiments.{name}" for name in EXPERIMENTS},
    **{name: f"scripts.{name}" for name in SCRIPTS},
}


@pytest.fixture(scope="session")
def preloaded(environment) -> Iterator[subprocess.Popen]:
    """The process that all commands are forked from."""
    script = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("preloaded.py"))]
    with subprocess.Popen(
        [*script, *MAINS.values()],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.stdin.close()


def _main(name: str):
    @pytest.fixture(scope="session", name=name)
    def main(preloaded) -> Command:
        def command(
            *arguments: str, hidden: tuple[str, ...] = (), stdin: str = "", kill: tuple = ()
        ) -> Outcome:
            request = {
                "module": MAINS[name],
                "arguments": list(map(str, arguments)),
                "hidden": list(hidden),
                "stdin": stdin,
                "kill": [str(kill[0]), kill[1]] if kill else [],
            }
            preloaded.stdin.write(json.dumps(request) + "\n")
            preloaded.stdin.flush()
            return Outcome(**json.loads(preloaded.stdout.readline()))

        return command

    return main


answer, build_index, compare, evolve, finetune, plan_pod, sweep_lora = map(_main, EXPERIMENTS)
export, pack_rows = map(_main, SCRIPTS)


@pytest.fixture(scope="session")
def finished(compare, world) -> Outcome:
    """A comparison of all eight methods, in the folder `all`."""
    outcome = compare(*world.flags(), *SETTINGS, "--name=all")
    assert outcome.code == 0, outcome.err
    return outcome
