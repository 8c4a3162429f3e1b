"""Workers of a sweep, as a user starts them."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests.multiprocess.launch import SWEEP, Crowd


@pytest.fixture
def start_sweep(launcher, tmp_path_factory) -> Callable[..., Crowd]:
    """`start_sweep(*arguments)` starts a process of `launch.sweep` with the environment of the
    test. `test_jobset.py` starts it as a shell would."""

    def start(*arguments: object) -> Crowd:
        log = tmp_path_factory.mktemp("log")
        return launcher.start(SWEEP, arguments, 1, log, environ=lambda i, n: dict(os.environ))

    return start
