"""Seconds of a single query, as a user waits for it once its programs are compiled."""

from __future__ import annotations

import time

from experiments.compiling import compiling
from kafjax.core.records import Question
from kafjax.methods import Method


def alone(method: Method, question: Question) -> dict[str, float]:
    """Asks one question by itself, and again where something had to be compiled. Returns the
    seconds of its stages and their `total`."""
    with compiling() as compiled:
        seconds = _ask(method, question)
    return _ask(method, question) if compiled else seconds


def _ask(method: Method, question: Question) -> dict[str, float]:
    began = time.perf_counter()
    (prediction,) = method.answer([question])
    return {**prediction.seconds, "total": time.perf_counter() - began}
