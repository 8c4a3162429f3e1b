"""The compiled text of bfloat16 programs on a CPU, with our options."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from kafjax.core.programs import compiler_options, program
from kafjax.ops.linear import dot, linear

LOW = jnp.bfloat16


def text_of(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, LOW) for shape in shapes]
    options = compiler_options("cpu")
    return jax.jit(function, compiler_options=options).lower(*arguments).compile().as_text()


def layers(x, kernels):
    return jax.lax.scan(lambda x, kernel: (linear(x, kernel), None), x, kernels)[0]


def gradient(x, kernels):
    return jax.grad(lambda k: jnp.sum(layers(x, k).astype(jnp.float32)))(kernels)


@pytest.mark.optimised  # it is about what XLA makes of the program
@pytest.mark.parametrize("function", [layers, gradient])
def test_a_loop_over_layers_holds_no_float32_copy_of_their_kernels(function):
    assert "f32[3,48,48]" not in text_of(function, (2, 48), (3, 48, 48))


@pytest.mark.optimised
@pytest.mark.parametrize(("axis", "shape"), [(0, (48, 80)), (1, (80, 48))])
def test_a_single_row_is_multiplied_without_widening_the_matrix(axis, shape):
    def widened(function):
        return "f32[{},{}]".format(*shape) in text_of(function, (1, 48), shape)

    def plain(x, y):
        contract = (((1,), (axis,)), ((), ()))
        return jax.lax.dot_general(x, y, contract, preferred_element_type=jnp.float32)

    assert widened(plain), "XLA has learned it: drop the second row"
    assert not widened(lambda x, y: dot(x, y, axis))


@pytest.mark.optimised
def test_the_gradient_of_a_kernel_widens_neither_side():
    def of_kernel(x, kernel, cotangent):
        return jax.vjp(lambda kernel: linear(x, kernel), kernel)[1](cotangent)

    text = text_of(of_kernel, (2, 16, 48), (48, 80), (2, 16, 80))
    assert "f32[32,48]" not in text and "f32[32,80]" not in text


def test_a_program_is_compiled_for_the_platform_of_its_model():
    @dataclasses.dataclass(frozen=True)
    class Model:
        constrain: object = dataclasses.field(
            default_factory=lambda: SimpleNamespace(platform="cpu"), compare=False
        )

    @program(static=("times",))
    def scaled(model, x, times):
        return x * times

    assert float(scaled(Model(), jnp.float32(2), times=3)) == 6
    assert (scaled.n_compiled("cpu"), scaled.n_compiled("tpu")) == (1, 0)
    assert compiler_options("tpu") == compiler_options("cuda") == {}
