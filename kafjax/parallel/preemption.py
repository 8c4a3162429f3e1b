"""SIGTERM as a request to save and go: schedulers send it some seconds before they take a machine
away."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils


class Preemption:
    """`with Preemption() as preemption: ... preemption.reached(step)` after every step.

    With many processes the signal may reach any of them: JAX's coordination service then finds a
    step that none has passed, and `reached` is true at that one in all of them. With one process it
    is true at the step after the signal.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None

    def __enter__(self) -> Preemption:
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def reached(self, step: int) -> bool:
        return (
            self._asked
            if jax.process_count() == 1
            else multihost_utils.reached_preemption_sync_point(step)
        )
