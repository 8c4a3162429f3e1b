"""`base`: the untouched model. Its answers are knowledge or guesses."""

from __future__ import annotations

from kafjax.methods.method import ClosedBook


class Base(ClosedBook):
    """Answers with the untouched weights."""

    activity = "answering"
    note = "the model as it came, no passages"
