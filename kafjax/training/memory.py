"""Peak memory of a stretch of work: the accelerator's own count where there is one, else the
process's resident size, sampled."""

from __future__ import annotations

import threading
from types import TracebackType

import jax
import psutil

_SAMPLE_SECONDS = 0.05


class PeakMemory:
    """`with PeakMemory() as peak: ...`, then `peak.n_bytes`.

    On an accelerator it is the highest count of any local device since the process started (a
    runtime keeps no other). On a CPU it is the highest resident size of the whole process during
    the block, so it includes Python and whatever else is loaded.
    """

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._highest = 0

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        finished = False
        while not finished:
            self._highest = max(self._highest, self._process.memory_info().rss)
            finished = self._done.wait(_SAMPLE_SECONDS)

    @property
    def n_bytes(self) -> int:
        on_device = [
            (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
            for device in jax.local_devices()
        ]
        return max(on_device) or self._highest
