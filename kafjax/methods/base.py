"""`base`: the model as it came. What it answers, it knew or guessed."""

from __future__ import annotations

from kafjax.methods.method import ClosedBook


class Base(ClosedBook):
    """Answers with the weights as they came."""

    activity = "answering"
    note = "the model as it came, no passages"
