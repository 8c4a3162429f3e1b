"""Progress output: a bar on a terminal; elsewhere (log files, CI) a line at least every ten
seconds, also while nothing advances."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Generator
from types import TracebackType

from tqdm import tqdm

from kafjax.core.text import visible

LINE_SECONDS = 10.0
BAR_SECONDS = 1.0
_silent = False
Advance = Callable[[int], None]
"""Called with the number of items that are done since the last call."""


def unshown(n: int) -> None:
    """Shows no progress: the default wherever an `Advance` is taken."""


class _Bar(tqdm):
    monitor_interval = 0  # tqdm's own watching thread would outlive the bar; ours does its work


def silence() -> None:
    """Disables progress output in this process, since another of the processes shows it."""
    global _silent
    _silent = True


def say(label: str, text: str) -> None:
    """Prints a line to stderr without breaking a bar on the screen."""
    if _silent:
        return
    _Bar.write(visible(f"{label}: {text}"), file=sys.stderr)
    sys.stderr.flush()


class Progress:
    """A count towards `total`, of which `done` were done earlier: `with Progress("train", 100) as
    bar: bar.advance(1, "loss 1.2")`.

    `total` is None where it is unknown. `text` stands beside the count from the start. A thread
    keeps printing while a step takes long, until the block ends.
    """

    def __init__(
        self, label: str, total: int | None, done: int = 0, unit: str = "step", text: str = ""
    ):
        self._label, self._total, self._done, self._start, self._unit = (
            label,
            total,
            done,
            done,
            unit,
        )
        self._text = text
        self._bar: _Bar | None = None
        self._lock = threading.Lock()
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Progress:
        self._began = self._last_line = self._advanced = time.monotonic()
        if _shows_bars():
            bar = _Bar(
                total=self._total,
                initial=self._done,
                desc=self._label,
                unit=self._unit,
                dynamic_ncols=True,
            )
            self._bar = self._open.enter_context(bar)
            bar.set_postfix_str(self._text)
            self._open.enter_context(_repeating(bar.refresh, lambda: BAR_SECONDS))
        else:
            self._open.enter_context(_repeating(self._line_if_due, self._seconds_to_line))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._open.__exit__(kind, error, traceback)

    def advance(self, n: int, text: str | None = None) -> None:
        """Adds `n` to the count and shows `text` beside it, by default what stood there."""
        self._done += n
        self._text = self._text if text is None else text
        self._advanced = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(self._text, refresh=False)
            self._bar.update(n)
        else:
            self._line_if_due()

    def _seconds_to_line(self) -> float:
        return self._last_line + LINE_SECONDS - time.monotonic()

    def _line_if_due(self) -> None:
        with self._lock:
            left = math.inf if self._total is None else self._total - self._done
            if left > 0 and self._seconds_to_line() > 0:
                return
            self._last_line = time.monotonic()
            seconds, new = self._last_line - self._began, self._done - self._start
            # By what is done; while nothing advances the rest becomes shorter, not longer.
            rest = 0.0
            if new and 0 < left < math.inf:
                rest = (self._advanced - self._began) / new * left
                rest -= self._last_line - self._advanced
            when = f"{rest:.0f} s left" if rest >= 1 else f"{seconds:.0f} s"
            count = (
                f"{self._done} {self._unit}s"
                if self._total is None
                else f"{self._done}/{self._total}"
            )
            say(self._label, f"{count}  {self._text}".rstrip() + f", {when}")


@contextlib.contextmanager
def waiting(label: str, what: str, after: float = 0.0) -> Generator[None]:
    """Prints that `what` is being waited for, once `after` seconds have passed and every ten
    seconds then, until the block ends."""
    began = time.monotonic()
    if not after:
        say(label, f"{what} ...")
    pauses = itertools.chain([after or LINE_SECONDS], itertools.repeat(LINE_SECONDS))
    with _repeating(
        lambda: say(label, f"{what}, {time.monotonic() - began:.0f} s ..."), lambda: next(pauses)
    ):
        yield


def _shows_bars() -> bool:
    # Some pseudo-terminals have no size; tqdm would draw a bar of no width there.
    return (
        not _silent
        and sys.stderr.isatty()
        and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    )


@contextlib.contextmanager
def _repeating(action: Callable[[], None], pause: Callable[[], float]) -> Generator[None]:
    """Calls `action` from a thread, each time after `pause()` seconds, until the block is left."""
    left = threading.Event()

    def run() -> None:
        while not left.wait(pause()):
            action()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join()
