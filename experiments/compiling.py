"""Time spent compiling, told apart from the time of the work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax


@contextlib.contextmanager
def compiling() -> Iterator[list[float]]:
    """Yields a list that takes the seconds of each program that XLA compiles (or finds in its
    cache) within the block."""
    seconds: list[float] = []

    def on_event(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(on_event)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(on_event)
