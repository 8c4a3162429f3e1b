"""CPU seconds of each test file, measured with `--write-seconds` and kept in seconds.json: long
files start first, or are left out.

Wall time depends on what else runs, so CPU seconds are counted, those of processes that tests start
included. A file pays for the fixtures of its directory if it is the first to use them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

TESTS = Path(__file__).parent
TABLE = TESTS / "seconds.json"
LONG = 5.0  # CPU seconds from which on all of a file's tests are marked `slow`


def cpu_seconds() -> float:
    """CPU time of this process and of all that it started."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(sum(process.cpu_times()[:4]) for process in processes)


class Seconds:
    """Plugin that orders the files of a session, marks the long ones, and with `--write-seconds`
    measures those that ran."""

    def __init__(self, write: bool):
        self._write = write
        self._known: dict[str, float] = json.loads(TABLE.read_text()) if TABLE.exists() else {}
        self._measured: dict[str, float] = {}
        self._began = 0.0

    @pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            if self._known.get(_name(item), 0.0) >= LONG:
                item.add_marker(pytest.mark.slow)
        items.sort(key=lambda item: -self._known.get(_name(item), 0.0))

    def pytest_collection_finish(self) -> None:
        self._began = cpu_seconds()  # imports are nobody's

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> Iterator[None]:
        result = yield
        if self._write and (nextitem is None or nextitem.path != item.path):
            now = cpu_seconds()
            self._measured[_name(item)] = round(
                self._measured.get(_name(item), 0.0) + now - self._began, 1
            )
            self._began = now
        return result

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workerinput"):
            session.config.workeroutput["seconds"] = self._measured
        elif self._measured:
            costly = {
                name: seconds
                for name, seconds in (self._known | self._measured).items()
                if (TESTS / name).exists()
            }
            lines = [
                f"  {json.dumps(name)}: {seconds}"
                for name, seconds in sorted(costly.items(), key=lambda pair: -pair[1])
            ]
            TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self._measured |= getattr(node, "workeroutput", {}).get("seconds", {})


def _name(item: pytest.Item) -> str:
    return os.path.relpath(item.path, TESTS)
