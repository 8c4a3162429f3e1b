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


def _preloaded(module: str, environment: dict[str, str]) -> Iterator[Command]:
    script = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("preloaded.py")), module]
    process = subprocess.Popen(
        script, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def command(
        *arguments: str, hidden: tuple[str, ...] = (), stdin: str = "", kill: tuple = ()
    ) -> Outcome:
        request = {"arguments": list(map(str, arguments)), "hidden": list(hidden), "stdin": stdin}
        request["kill"] = [str(kill[0]), kill[1]] if kill else []
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        return Outcome(**json.loads(process.stdout.readline()))

    yield command
    process.stdin.close()
    process.wait(timeout=60)
    process.stdout.close()


def _main(name: str):
    @pytest.fixture(scope="session", name=name)
    def command(environment) -> Iterator[Command]:
        yield from _preloaded(f"experiments.{name}", environment)

    return command


compare, answer, finetune, build_index, sweep_lora = map(
    _main, ("compare", "answer", "finetune", "build_index", "sweep_lora")
)
plan_pod = _main("plan_pod")
evolve = _main("evolve")


@pytest.fixture(scope="session")
def export(environment) -> Iterator[Command]:
    yield from _preloaded("scripts.export", environment)


@pytest.fixture(scope="session")
def pack_rows(environment) -> Iterator[Command]:
    yield from _preloaded("scripts.pack_rows", environment)


@pytest.fixture(scope="session")
def finished(compare, world) -> Outcome:
    """A comparison of all eight methods, in the folder `all`."""
    outcome = compare(*world.flags(), *SETTINGS, "--name=all")
    assert outcome.code == 0, outcome.err
    return outcome
