from __future__ import annotations

import jax
import numpy as np
import pytest

from kafjax.models import Decoder
from kafjax.training import Example
from tests.shapes import TINY


@pytest.fixture(scope="session")
def model() -> Decoder:
    return Decoder(TINY)


@pytest.fixture(scope="session")
def params(model):
    return jax.jit(model.init)(jax.random.key(0))


def random_example(rng: np.random.Generator, n: int, answer_only: bool = False) -> Example:
    weights = np.ones(n, np.float32)
    weights[: n // 2 if answer_only else 1] = 0
    return Example(rng.integers(1, TINY.vocab_size, n).astype(np.int32), weights)


@pytest.fixture(scope="session")
def examples() -> list[Example]:
    """Texts and question-answer pairs of 2 to 14 tokens."""
    rng = np.random.default_rng(0)
    return [random_example(rng, int(n), answer_only=bool(n % 2)) for n in rng.integers(2, 15, 24)]
