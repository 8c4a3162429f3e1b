from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.multiprocess.launch import Launcher


@pytest.fixture(scope="session")
def launcher(kafjax_cache) -> Iterator[Launcher]:
    with Launcher() as launcher:
        yield launcher
