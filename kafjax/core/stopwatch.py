"""Seconds of the stages of some work, whoever does it.

with stages() as seconds:
    retriever.search(texts, 5)      # inside it: `with stage("embed"): ...`
seconds                             # {"embed": 0.011, "search": 0.0004}
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator
from contextvars import ContextVar

_SECONDS: ContextVar[dict[str, float] | None] = ContextVar("seconds", default=None)


@contextlib.contextmanager
def stages() -> Generator[dict[str, float]]:
    """Collects the seconds of every `stage` that ends inside the block, summed by name."""
    seconds: dict[str, float] = {}
    token = _SECONDS.set(seconds)
    try:
        yield seconds
    finally:
        _SECONDS.reset(token)


@contextlib.contextmanager
def stage(name: str) -> Generator[None]:
    """Adds the seconds of the block to the innermost `stages`, if there is one. Stages of one name
    add up; they must not nest."""
    began = time.perf_counter()
    yield
    if (seconds := _SECONDS.get()) is not None:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
