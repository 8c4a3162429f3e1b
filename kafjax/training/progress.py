"""Signs of life: a bar on a terminal, a line at least every ten seconds elsewhere (log files, CI)."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType

from tqdm import tqdm

_LINE_SECONDS = 10.0


def say(label: str, text: str) -> None:
    """A line on stderr that leaves a bar on the screen whole."""
    tqdm.write(f"{label}: {text}", file=sys.stderr)
    sys.stderr.flush()


@contextlib.contextmanager
def waiting(label: str, what: str) -> Iterator[None]:
    """Says what is being waited for, and again every ten seconds until it is done."""
    say(label, f"{what} ...")
    began, done = time.monotonic(), threading.Event()

    def remind() -> None:
        while not done.wait(_LINE_SECONDS):
            say(label, f"{what}, {time.monotonic() - began:.0f} s ...")

    thread = threading.Thread(target=remind, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class Progress:
    """A loop of `total` steps, of which `done` were done earlier: `with Progress(...) as progress: progress.update(step, text)`."""

    def __init__(self, label: str, total: int, done: int = 0):
        self._label, self._total, self._done, self._start = label, total, done, done
        self._bar = tqdm(total=total, initial=done, desc=label, unit="step", dynamic_ncols=True) if sys.stderr.isatty() else None
        self._began = time.monotonic()
        self._last_line = float("-inf")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, done: int, text: str) -> None:
        """Steps done so far, and what to show beside them."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._done)
        self._done = done
        now = time.monotonic()
        if self._bar is None and (done == self._total or now - self._last_line >= _LINE_SECONDS):
            left = (now - self._began) / max(done - self._start, 1) * (self._total - done)
            say(self._label, f"{done}/{self._total}  {text}, {left:.0f} s left")
            self._last_line = now
