"""FLOPs of a traced program, counted by XLA: the body of a loop as often as it runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.extend.core
from jax.extend.core import ClosedJaxpr


def flops(jaxpr: ClosedJaxpr, lowered: jax.stages.Lowered) -> float:
    """Counts the FLOPs of a program over all its devices. Bodies of `while_loop` count once.

    Args:
      jaxpr: the traced program.
      lowered: the same, lowered.
    """
    return _once_and_all(jaxpr, lowered)[1]


def _once_and_all(jaxpr: ClosedJaxpr, lowered: jax.stages.Lowered) -> tuple[float, float]:
    """Returns XLA's own count, in which the body of a loop counts once, and that of all its turns.

    Each body that counts too little is lowered alone, tens of milliseconds. An unrolled program
    would have to be traced again, a layer at a time.
    """
    costs: Any = lowered.cost_analysis()
    once = total = float(costs.get("flops", 0.0))  # it is missing where nothing is computed
    for turns, in_program, body in _scans(jaxpr.jaxpr):
        if turns == in_program and _counts_once(body):
            continue
        inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in body.in_avals]
        function = jax.jit(jax.extend.core.jaxpr_as_fun(body))
        of_body, of_all = _once_and_all(body, function.lower(*inputs))
        total += turns * of_all - in_program * of_body
    return once, total


def _counts_once(jaxpr: ClosedJaxpr) -> bool:
    """True if XLA's own count is that of all turns."""
    return all(
        turns == in_program and _counts_once(body)
        for turns, in_program, body in _scans(jaxpr.jaxpr)
    )


def _scans(jaxpr: Any) -> Iterator[tuple[int, int, ClosedJaxpr]]:
    """Yields turns, copies of the body in the lowered program, and body of each scan that is not
    within another."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            length, unroll = equation.params["length"], equation.params["unroll"]
            yield length, min(unroll, length), equation.params["jaxpr"]
        else:
            inner = jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr)
            for value in filter(_is_jaxpr, inner):
                yield from _scans(getattr(value, "jaxpr", value))


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")
