"""The adapter step makes nothing of the size of a kernel: read off its jaxpr and off the compiled
program's memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from kafjax import lora
from kafjax.core import trees
from kafjax.models import Decoder, DecoderConfig
from kafjax.ops.loss import chunked_cross_entropy
from tests import compiling
from tests.variants import SINGLE, TOGETHER

pytestmark = pytest.mark.optimised

# Sizes chosen so that no activation [tokens, ..] has the shape of a kernel by accident.
SMALL = DecoderConfig(
    vocab_size=97,
    hidden_size=40,
    mlp_size=72,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=12,
    sliding=(True, False, True),
    window=4,
)
SPEC = lora.Spec(rank=3)
Loss = Callable[[lora.Adapters, trees.Tree, jax.Array], jax.Array]


def loss_of(model: Decoder, attach: Callable = lora.attach, spec: lora.Spec = SPEC) -> Loss:
    def loss(adapters, params, tokens_BxT):
        attached = attach(params, adapters, spec, jax.random.key(0))
        hidden_BxTxD, _ = model.hidden(attached, tokens_BxT)
        targets_N = tokens_BxT[:, 1:].reshape(-1)
        hidden_NxD = hidden_BxTxD[:, :-1].reshape(-1, model.config.hidden_size)
        return chunked_cross_entropy(
            hidden_NxD, model.unembedding(attached), targets_N, jnp.ones(targets_N.shape), chunk=4
        )

    return loss


def arguments(
    model: Decoder, dtype: Any, shape: tuple[int, int], spec: lora.Spec = SPEC
) -> tuple[Any, ...]:
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), model.abstract_params())
    return lora.abstract(spec, params), params, jax.ShapeDtypeStruct(shape, jnp.int32)


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, those of nested jaxprs (scan, checkpoint, jit, custom rules, conditionals)
    included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from equations(getattr(value, "jaxpr", value))


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def of_kernel_size(
    gradient: Callable, arguments: tuple[Any, ...]
) -> set[tuple[str, tuple[int, ...]]]:
    """(primitive, shape) of each value in the step that is as large as a weight: of one layer or
    all, as it lies or transposed."""
    forbidden = set()
    for path, leaf in trees.flatten(arguments[1]).items():
        if path.endswith(("kernel", "embedding")):
            *stacked, n_in, n_out = leaf.shape
            forbidden |= {
                (*lead, *last)
                for lead in ((), (1,), tuple(stacked))
                for last in ((n_in, n_out), (n_out, n_in))
            }
    made = equations(jax.make_jaxpr(gradient)(*arguments).jaxpr)
    return {
        (e.primitive.name, v.aval.shape)
        for e in made
        for v in e.outvars
        if v.aval.shape in forbidden
    }


def materialising(params, adapters, spec, key):
    """A counterexample: a step that materialises W + BA, under the same call."""
    return lora.merge(params, adapters, spec)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_value_in_the_step_has_the_size_of_a_kernel(dtype, unroll, remat):
    model = Decoder(SMALL, dtype=dtype, unroll=unroll, remat=remat)
    step_arguments = arguments(model, dtype, (2, 7))
    assert of_kernel_size(jax.grad(loss_of(model)), step_arguments) == set()


MODELS = {
    "float32": Decoder(SMALL),
    "bfloat16, a head of its own, remat": Decoder(
        dataclasses.replace(SMALL, tied=False), dtype=jnp.bfloat16, remat="full"
    ),
}


@pytest.mark.parametrize("form", MODELS)
@pytest.mark.parametrize("name", [*SINGLE, *TOGETHER])
def test_nor_has_any_in_the_step_of_a_variant(name, form):
    """DoRA's norms of the columns of W + BA among them; embeddings and heads as much as kernels."""
    spec, model = (SINGLE | TOGETHER)[name], MODELS[form]
    gradient = jax.grad(loss_of(model, spec=spec))
    assert of_kernel_size(gradient, arguments(model, model.dtype, (2, 7), spec)) == set()


@pytest.mark.parametrize("unroll", [False, True])
def test_the_check_sees_what_it_is_for(unroll):
    """A merged kernel, a gradient of the base that is thrown away, a kernel cast in each step, and
    one hidden in a nested program."""
    model = Decoder(SMALL, unroll=unroll)
    step_arguments = arguments(model, jnp.float32, (2, 7))
    merged = jax.grad(loss_of(model, materialising))
    base_too = jax.grad(loss_of(model), argnums=(0, 1))
    hidden = jax.jit(jax.checkpoint(lambda *args: jax.lax.cond(True, merged, merged, *args)))
    for step in (merged, base_too, hidden):
        seen = of_kernel_size(step, step_arguments)
        assert {(3, 40, 48), (3, 40, 24), (3, 72, 40)} <= {shape for _, shape in seen}
    cast = of_kernel_size(
        jax.grad(loss_of(dataclasses.replace(model, dtype=jnp.bfloat16))), step_arguments
    )
    # so: keep a frozen base in the dtype of the activations
    assert {name for name, _ in cast} >= {"convert_element_type"}


def temporaries(model: Decoder, spec: lora.Spec, attach: Callable = lora.attach) -> tuple[int, int]:
    """Bytes of the compiled step's temporaries, and of the kernels that are adapted."""
    step_arguments = arguments(model, jnp.float32, (1, 8), spec)
    adapted = {
        path: leaf
        for path, leaf in trees.flatten(step_arguments[1]).items()
        if path in step_arguments[0]
    }
    lowered = jax.jit(jax.grad(loss_of(model, attach, spec))).lower(*step_arguments)
    return compiling.memory_of(lowered).temp_size_in_bytes, trees.n_bytes(adapted)


WIDE = dataclasses.replace(
    SMALL,
    vocab_size=16384,
    hidden_size=160,
    mlp_size=512,
    head_dim=32,
    n_layers=6,
    sliding=(True, False) * 3,
)


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        dataclasses.replace(SPEC, dora=True, dropout=0.1),
        dataclasses.replace(SPEC, targets="embed", dora=True),
    ],
    ids=["plain", "dora and dropout", "embedding and dora"],
)
def test_compiled_memory_stays_below_the_base(spec):
    """Layers are wide and tokens few: the step's temporaries are a fraction of the weights."""
    made, kernels = temporaries(Decoder(WIDE), spec)
    assert made < 0.4 * kernels


def test_compiled_memory_of_a_materialising_step_is_seen():
    made, kernels = temporaries(Decoder(WIDE), SPEC, materialising)
    assert made > kernels
