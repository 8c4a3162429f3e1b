"""Benchmarks as a user starts them, on tiny models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.multiprocess.launch import Ended, Launcher

# Without train_speed, which starts a backend when it is imported: its threads would be lost in a
# fork. What it imports is among what these import.
IMPORTED = [
    f"benchmarks.{name}"
    for name in ("lanes", "lora_variants", "quantized_base", "search", "serve_speed")
]


@pytest.fixture(scope="session")
def launcher(kafjax_cache) -> Iterator[Launcher]:
    with Launcher(IMPORTED) as launcher:
        yield launcher


@pytest.fixture
def benchmark(launcher, request, tmp_path_factory) -> Callable[..., Ended]:
    """`benchmark(*arguments)` runs the benchmark that the file is named after."""
    module = f"benchmarks.{Path(request.path).stem.removeprefix('test_')}"

    def benchmark(*arguments: object) -> Ended:
        log = tmp_path_factory.mktemp("log")
        (ended,) = launcher.start(module, arguments, 1, log, environ=lambda i, n: {}).ended()
        return ended

    return benchmark
