"""Quick compiles: a tiny model runs in milliseconds, and compiling its program takes seconds.

JAX's own switch for this saves little. On a CPU most of the time goes into code for fusions: with
the older emitters, and in one piece, a training step compiles in a third of the time.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OPTIONS = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
_original: Any = None


def environment(*, devices: int = 1, optimised: bool = False, **changes: str) -> dict[str, str]:
    """Environment of a process that a test starts, with `devices` CPU devices. With `optimised` it
    compiles as for a user."""
    ours = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    options = " ".join(f"--{name}={str(value).lower()}" for name, value in OPTIONS.items())
    quick = {} if optimised else {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": options}
    return {**os.environ, **ours, **quick, **changes}


def memory_of(lowered: Any) -> Any:
    """Memory of a program that is compiled as for a user, but for the machine code: LLVM, which
    takes four fifths of the time, allocates no buffer."""
    options = {
        **OPTIONS,
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    }
    return lowered.compile(compiler_options=options).memory_analysis()


def collect_rarely() -> None:
    """Takes what was imported out of the garbage collector's sight, and lets it run a hundredth as
    often: a tenth of the time of tracing went into it. Forked children share what was imported as
    long as nobody writes there."""
    gc.freeze()
    gc.set_threshold(70_000)


def compile_quickly(quick: bool) -> None:
    """Switches between quick compiles and those of a user in this process. Programs compiled the
    other way are dropped."""
    import jax

    # JAX has no public setting for options of programs that others compile
    from jax._src import compiler

    global _original
    if _original is None:
        _original, compiler.get_compile_options = compiler.get_compile_options, _get_compile_options
    if jax.config.read("jax_disable_most_optimizations") != quick:
        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", quick)


def _get_compile_options(
    *args: Any, env_options_overrides: dict[str, Any] | None = None, **kwargs: Any
) -> Any:
    import jax

    ours = OPTIONS if jax.config.read("jax_disable_most_optimizations") else {}
    return _original(
        *args, env_options_overrides={**ours, **(env_options_overrides or {})}, **kwargs
    )
