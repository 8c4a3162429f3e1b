"""Set-up of every test: no network, no trace outside the session, and a reason for each test this
machine cannot run."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests import compiling, seconds
from tests.buckets import amazon, google, place  # noqa: F401
from tests.multiprocess.launch import Launcher

# Before any test module imports the libraries that read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")
# Compiled programs stay for the next session: JAX finds them by the program, the options and the
# compiler's version. Set here, since the conftest of a folder imports JAX before pytest is
# configured.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "d" / "xla")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Where in Python an operation stands is written into each program, a twentieth of its lowering.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# torch's threads would spin on cores that the other worker needs
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A shell starts background jobs with Ctrl-C ignored, and children inherit that: the tests that
# press it would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Examples are not timed: the first one may compile, and a busy machine is slow. pytest-timeout ends
# a test that hangs.
hypothesis.settings.register_profile("kafjax", deadline=None)
hypothesis.settings.load_profile("kafjax")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz", type=int, default=200, help="inputs that each fuzz test of a reader tries"
    )
    parser.addoption(
        "--write-seconds",
        action="store_true",
        help="note the CPU seconds of each test file in tests/seconds.json",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Gives all workers, and the processes that tests start, one folder of converted weights.

    It is new in each session: weights that older code converted would hide a broken conversion.
    pytest-xdist's workers are started after this and inherit the environment.
    """
    config.pluginmanager.register(seconds.Seconds(config.getoption("--write-seconds")))
    if hasattr(config, "workerinput"):
        return
    if "KAFJAX_CACHE" not in os.environ:
        os.environ["KAFJAX_CACHE"] = tempfile.mkdtemp(prefix="kafjax-tests-")
        config.add_cleanup(
            lambda: shutil.rmtree(os.environ.pop("KAFJAX_CACHE"), ignore_errors=True)
        )


def pytest_collection_finish() -> None:
    """Takes what was imported out of the collector's sight: half a million objects, which live as
    long as the session and would be gone over again and again."""
    gc.collect()
    compiling.collect_rarely()


@pytest.fixture(scope="session")
def kafjax_cache() -> Path:
    """The session's folder of converted weights."""
    return Path(os.environ["KAFJAX_CACHE"])


@pytest.fixture(scope="session")
def launcher(kafjax_cache) -> Iterator[Launcher]:
    with Launcher() as launcher:
        yield launcher


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Chooses how programs are compiled before any fixture compiles one, and skips what this
    machine cannot run."""
    compiling.compile_quickly(item.get_closest_marker("optimised") is None)
    for marker, (available, reason) in NEEDS.items():
        if item.get_closest_marker(marker) and not available():
            pytest.skip(reason)


def _has_gpu() -> bool:
    import jax  # only a test that asks for a GPU pays for starting the backend

    return jax.default_backend() == "gpu"


NEEDS = {
    "gpu": (_has_gpu, "JAX sees no GPU"),
    "ray": (
        lambda: importlib.util.find_spec("ray") is not None,
        "ray is not installed (extra [launch])",
    ),
    "slurm": (
        lambda: shutil.which("slurmctld") is not None,
        "SLURM is not installed (no slurmctld on PATH)",
    ),
    "tpu_aot": (
        lambda: importlib.util.find_spec("libtpu") is not None,
        "libtpu is not installed (extra [tpu])",
    ),
}
