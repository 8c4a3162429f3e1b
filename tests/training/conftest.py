from __future__ import annotations

import jax
import numpy as np
import pytest

from kafjax.models import Decoder, DecoderConfig
from kafjax.training import Example

CONFIG = DecoderConfig(
    vocab_size=61, hidden_size=16, mlp_size=24, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=8, sliding=(True, False), window=5
)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module", autouse=True)
def quick_compiles(compiled):
    """The time of tiny models goes into compiling: optimise little, and compile a program that several tests train with only once."""
    cache = {
        "jax_compilation_cache_dir": str(compiled),
        "jax_persistent_cache_min_compile_time_secs": 0.5,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in cache}
    for name, value in {**cache, "jax_disable_most_optimizations": True}.items():
        jax.config.update(name, value)
    yield
    for name, value in {**before, "jax_disable_most_optimizations": False}.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def model() -> Decoder:
    return Decoder(CONFIG)


@pytest.fixture(scope="session")
def params(model):
    return jax.jit(model.init)(jax.random.key(0))


def random_example(rng: np.random.Generator, n: int, answer_only: bool = False) -> Example:
    weights = np.ones(n, np.float32)
    weights[: n // 2 if answer_only else 1] = 0
    return Example(rng.integers(1, CONFIG.vocab_size, n).astype(np.int32), weights)


@pytest.fixture(scope="session")
def examples() -> list[Example]:
    """Texts and question-answer pairs of 2 to 14 tokens."""
    rng = np.random.default_rng(0)
    return [random_example(rng, int(n), answer_only=bool(n % 2)) for n in rng.integers(2, 15, 24)]
