"""What every test stands on: no network, no trace outside the session, and a reason for each test this machine cannot run."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# Before any test module imports the libraries that read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")

# A shell starts background jobs with Ctrl-C ignored, and children inherit that: the tests that press it would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Examples are not timed: the first one may compile, and a busy machine is slow. pytest-timeout ends a test that hangs.
hypothesis.settings.register_profile("kafjax", deadline=None)
hypothesis.settings.load_profile("kafjax")


@pytest.fixture(scope="session", autouse=True)
def kafjax_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Converted weights go to a folder of this session: one left by older code would hide a broken conversion."""
    if given := os.environ.get("KAFJAX_CACHE"):
        yield Path(given)
        return
    folder = tmp_path_factory.mktemp("kafjax-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KAFJAX_CACHE", str(folder))
        yield folder
    shutil.rmtree(folder)  # a gigabyte; after a kill, pytest removes it with its old temporary folders


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs that this session has compiled."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module", autouse=True)
def quick_compiles(request: pytest.FixtureRequest, compiled: Path) -> Iterator[None]:
    """The time of tiny models goes into compiling: optimise little, and compile a program that several tests run only once.

    Not where a module is marked `optimised`.
    """
    if request.node.get_closest_marker("optimised"):
        yield
        return
    import jax

    cache = {
        "jax_compilation_cache_dir": str(compiled),
        "jax_persistent_cache_min_compile_time_secs": 0.5,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in cache}
    for name, value in {**cache, "jax_disable_most_optimizations": True}.items():
        jax.config.update(name, value)
    yield
    for name, value in {**before, "jax_disable_most_optimizations": False}.items():
        jax.config.update(name, value)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, (available, reason) in NEEDS.items():
        if item.get_closest_marker(marker) and not available():
            pytest.skip(reason)


def _has_gpu() -> bool:
    import jax  # only a test that asks for a GPU pays for starting the backend

    return jax.default_backend() == "gpu"


NEEDS = {
    "gpu": (_has_gpu, "JAX sees no GPU"),
    "ray": (lambda: importlib.util.find_spec("ray") is not None, "ray is not installed (extra [launch])"),
    "slurm": (lambda: shutil.which("slurmctld") is not None, "SLURM is not installed (no slurmctld on PATH)"),
    "tpu_aot": (lambda: importlib.util.find_spec("libtpu") is not None, "libtpu is not installed (extra [tpu])"),
}
