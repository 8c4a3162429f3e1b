"""Sides for the tests of `benchmarks.bench`: they sleep, lack a package, or fail."""

from __future__ import annotations

import time

import numpy as np

from benchmarks.side import Side


def sleeping(seconds: float, result: list[float]) -> Side:
    def call() -> np.ndarray:
        time.sleep(seconds)
        return np.array(result)

    return Side(call, {"units": 10, "flops": 5e6})


def missing() -> Side:
    raise ModuleNotFoundError("No module named 'no_such_package'", name="no_such_package")


def broken() -> Side:
    raise ValueError("torn")
