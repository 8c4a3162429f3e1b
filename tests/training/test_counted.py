"""FLOPs of a step whose layers are a loop are those that XLA counts in the unrolled one."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from kafjax import lora
from kafjax.parallel import make_mesh
from kafjax.training import TrainConfig
from kafjax.training.counted import flops
from kafjax.training.loop import batches_of
from kafjax.training.task import Task

CONFIG = TrainConfig(steps=1, batch_rows=4, seq_len=16, learning_rate=3e-3)


@pytest.mark.parametrize("spec", [None, lora.Spec(4)], ids=["full", "lora"])
def test_flops_of_a_loop_over_layers_are_those_of_the_unrolled_step(model, params, examples, spec):
    batch = batches_of([examples], CONFIG, 1)[0]
    counts = {}
    for unroll in (False, True):
        of_layers = dataclasses.replace(model, unroll=unroll)
        given = (of_layers, params, CONFIG, make_mesh(), 1)
        task = Task.full(*given) if spec is None else Task.lora(*given, spec)
        traced = task.trace(batch)
        lowered = traced.lower()
        once = lowered.cost_analysis()["flops"]
        counts[unroll] = flops(traced.jaxpr, lowered)
        assert counts[unroll] == once if unroll else counts[unroll] > 1.3 * once
    assert counts[False] == pytest.approx(counts[True], rel=1e-3)


def test_a_loop_in_a_loop_counts_its_turns_in_each():
    def program(x):
        def inner(x, _):
            return x @ x, None

        def outer(x, _):
            return jax.lax.scan(inner, x, length=3)[0] + 1, None

        return jax.lax.scan(outer, x, length=5)[0]

    traced = jax.jit(program).trace(jnp.zeros((8, 8)))
    assert flops(traced.jaxpr, traced.lower()) == pytest.approx(
        5 * (3 * 2 * 8**3 + 8**2), abs=5 * 4
    )
