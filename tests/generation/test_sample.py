"""Drawn tokens against distributions worked out in numpy, one token at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from kafjax.core.errors import UserError
from kafjax.generation import Sampling, sample

LOGITS = np.array([0.3, 2.0, -1.5, 1.1, 0.0, 2.6, -0.4, 1.9, -7.0, 0.9])
N = 20_000

next_token = jax.jit(sample.next_token, static_argnames="sampling")


def reference(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Probabilities: the likeliest tokens are taken, one after the other, until there are k or
    their mass reaches p."""
    weights = np.exp(logits / temperature)
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[: top_k or None]
    weights = weights / weights[order].sum()
    kept, mass = [], 0.0
    for i in order:
        if mass >= top_p:
            break
        kept.append(i)
        mass += weights[i]
    p = np.zeros(len(logits))
    p[kept] = weights[kept] / mass
    return p


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1, 0, 1),
        (0.5, 0, 1),
        (2.5, 0, 1),
        (1, 3, 1),
        (1.5, 9, 1),
        (1, 99, 1),
        (1, 0, 0.6),
        (2, 0, 0.95),
        (0.7, 5, 0.8),
        (1, 4, 0.99),
    ],
)
def test_frequencies_fit_the_distribution(temperature, top_k, top_p):
    expected = reference(LOGITS, temperature, top_k, top_p)
    logits_NxV = jnp.broadcast_to(jnp.float32(LOGITS), (N, len(LOGITS)))
    drawn = next_token(
        logits_NxV,
        jax.random.split(jax.random.key(0), N),
        Sampling(temperature=temperature, top_k=top_k, top_p=top_p),
    )
    assert drawn.dtype == jnp.int32
    counts = np.bincount(drawn, minlength=len(LOGITS))
    assert not counts[expected == 0].any()
    often = expected * N >= 5  # a rarer token tells chi-square nothing
    pvalue = scipy.stats.chisquare(
        counts[often], expected[often] / expected[often].sum() * counts[often].sum()
    ).pvalue
    assert pvalue > 1e-3
    # The check has teeth: the distribution at another temperature does not pass.
    other = reference(LOGITS, temperature * 1.3, top_k, top_p)[often]
    assert (
        scipy.stats.chisquare(counts[often], other / other.sum() * counts[often].sum()).pvalue
        < 1e-6
    )


def test_rows_are_drawn_each_by_its_own_logits_and_key():
    rng = np.random.default_rng(0)
    logits_BxV = jnp.asarray(rng.normal(0, 2, (6, 50)), jnp.float32)
    key_B = jax.random.split(jax.random.key(1), 6)
    for sampling in (
        Sampling(),
        Sampling(temperature=1.0),
        Sampling(temperature=2.0, top_k=20, top_p=0.9),
    ):
        together = next_token(logits_BxV, key_B, sampling)
        alone = [
            int(next_token(logits_BxV[i : i + 1], key_B[i : i + 1], sampling)[0]) for i in range(6)
        ]
        assert together.tolist() == alone


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=1.0, top_k=1), Sampling(temperature=1.0, top_p=1e-9)],
    ids=str,
)
def test_of_equally_likely_tokens_greedy_takes_the_first(sampling):
    logits_BxV = jnp.zeros((64, 5)).at[:, 0].set(-1.0)
    keys = jax.random.split(jax.random.key(0), 64)
    assert set(next_token(logits_BxV, keys, sampling).tolist()) == {1}


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"stop": ("\n", "")},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(UserError):
        Sampling(**wrong)
