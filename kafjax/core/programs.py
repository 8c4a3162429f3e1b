"""Compiled programs, with the options of XLA that the platform needs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")


def compiler_options(platform: str) -> dict[str, str]:
    """Options of `jax.jit` on a platform of JAX's.

    XLA on a CPU replaces operations on bfloat16 that are no products by ones on float32. In a loop
    over layers that are slices of stacked kernels, which it therefore keeps as a float32 copy of
    all kernels, and narrows again layer by layer; what is kept for the backward pass is float32
    too. Its code generator knows bfloat16, so the pass is left out (docs/performance.md). Products of
    bfloat16 then have to ask for a float32 result, as all of ours do: others do not compile.
    """
    return {"xla_disable_hlo_passes": "float-normalization-bf16"} if platform == "cpu" else {}


class Program(Generic[P, R]):
    """`jax.jit` of `function(model, ...)`, `model` static, for the platform that the model is on.

    Other arguments are those of `jax.jit`, by name.
    """

    def __init__(
        self, function: Callable[P, R], static: tuple[str, ...] = (), donated: tuple[str, ...] = ()
    ):
        self._jitted = functools.cache(
            lambda platform: jax.jit(
                function,
                static_argnames=("model", *static),
                donate_argnames=donated,
                compiler_options=compiler_options(platform),
            )
        )
        functools.update_wrapper(self, function)

    def n_compiled(self, platform: str) -> int:
        """Counts the shapes and settings that it has been compiled for."""
        return self.on(platform)._cache_size()

    def on(self, platform: str) -> Any:
        """The jitted function for a platform of JAX's, to be lowered."""
        return self._jitted(platform)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        model: Any = args[0]
        return self.on(model.constrain.platform)(*args, **kwargs)


def program(
    *, static: tuple[str, ...] = (), donated: tuple[str, ...] = ()
) -> Callable[[Callable[P, R]], Program[P, R]]:
    """Decorator that makes a `Program`."""
    return lambda function: Program(function, static, donated)
