"""A made-up but realistic run of all eight methods: a table that looks like the one the project is
about."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from kafjax.core.records import Prediction
from kafjax.evaluation.cost import Cost, TokensPerQuery, adam_bytes, latency_summary
from kafjax.evaluation.results import Arm, collect
from kafjax.evaluation.score import score

SIZES = {"seen": 96, "paraphrase": 96, "untrained": 96, "retention": 48}
# Chance of a right answer on seen, paraphrase, untrained, retention, and of finding the gold
# passage (None: closed book).
ARMS = {
    "base": (0.0, 0.0, 0.0, 0.98, None),
    "oracle": (0.93, 0.93, 0.92, 0.9, 1.0),
    "rag": (0.93, 0.9, 0.9, 0.85, 0.96),
    "hyde": (0.9, 0.85, 0.85, 0.8, 0.8),
    "lora": (0.99, 0.88, 0.6, 0.4, None),
    "full": (0.99, 0.78, 0.75, 0.05, None),
    "lora+rag": (0.99, 0.95, 0.9, 0.4, 0.96),
    "full+rag": (0.99, 0.92, 0.9, 0.1, 0.96),
}
PASSAGES = 5


def make_predictions(method: str) -> list[Prediction]:
    *chances, found = ARMS[method]
    rng = np.random.default_rng([ord(letter) for letter in method])
    predictions = []
    for (split, size), chance in zip(SIZES.items(), chances, strict=True):
        for i in range(size):
            gold = () if split == "retention" else (f"p{i}.0",)
            passages = ()
            if found is not None:
                passages = (
                    gold
                    if method == "oracle"
                    else tuple(f"x{j}" for j in rng.integers(0, 200, PASSAGES))
                )
                if gold and method != "oracle" and rng.random() < found:
                    rank = rng.integers(PASSAGES)
                    passages = (*passages[:rank], *gold, *passages[rank + 1 :])
            reads = found is None or not gold or set(gold) & set(passages)
            right = rng.random() < (chance if reads else 0.05)
            answer = (
                (f"Veltmora {i}" if rng.random() < 0.8 else f"It was Veltmora {i}.")
                if right
                else f"Ostrand {i}"
            )
            predictions.append(
                score(
                    Prediction(
                        id=f"{split}-{i}",
                        method=method,
                        split=split,
                        question=f"In which town was person number {i} born?",
                        answer=answer,
                        answers=(f"Veltmora {i}",),
                        passages=passages,
                        gold_passages=gold,
                        prompt_tokens=230 if found else 70,
                        cached_tokens=52,
                        output_tokens=6,
                        calls=2 if method == "hyde" else 1,
                    )
                )
            )
    return predictions


def make_cost(method: str) -> Cost:
    rng = np.random.default_rng(len(method))
    found, trained = (
        ARMS[method][-1],
        {"full": 100_270_080, "lora": 3_796_992}.get(method.split("+")[0], 0),
    )
    adapter = method.startswith("lora")
    times = [
        {
            **(
                {"embed": 0.011 * rng.lognormal(0, 0.2), "search": 0.0004}
                if found and method != "oracle"
                else {}
            ),
            "prefill": (0.21 if found else 0.07) * rng.lognormal(0, 0.15),
            "decode": (0.9 if method == "hyde" else 0.28) * rng.lognormal(0, 0.2),
        }
        for _ in range(32)
    ]
    return Cost(
        trainable_parameters=trained,
        adapter_only=adapter,
        optimizer_bytes=adam_bytes(trained),
        train_tokens=161_000 if trained else 0,
        train_flops_formula=(7.2e13 if adapter else 1.05e14) if trained else 0.0,
        train_flops_measured=(7.9e13 if adapter else 1.16e14) if trained else None,
        train_seconds=(241.3 if adapter else 322.9) if trained else 0.0,
        index_seconds=3.4 if found and method != "oracle" else 0.0,
        index_flops_formula=2.1e11 if found and method != "oracle" else 0.0,
        peak_memory_bytes=int(6.1e9) if trained else int(2.9e9),
        artifact_bytes=4 * trained + (412_000 if found and method != "oracle" else 0),
        llm_calls_per_query=2 if method == "hyde" else 1,
        llm_tokens_per_query=TokensPerQuery(230.4 if found else 70.2, 52, 6.3),
        query_flops_formula=3.9e10 if found else 7.1e9,
        latency_seconds=latency_summary(times),
    )


def make_arm(method: str) -> Arm:
    worse = {"full": 0.45, "full+rag": 0.45, "lora": 0.2, "lora+rag": 0.2}.get(method, 0.0)
    rng = np.random.default_rng(7)
    tokens = rng.integers(80, 200, 24)
    nll = tokens * (3.1 + worse + worse * 0.3 * rng.standard_normal(24))
    return Arm(
        make_predictions(method),
        make_cost(method),
        nll.tolist(),
        tokens.tolist(),
        note=f"{method} as simulated",
    )


@pytest.fixture(scope="session")
def arms() -> dict[str, Arm]:
    return {method: make_arm(method) for method in ARMS}


CONFIG = {
    "corpus": "synthetic",
    "model": "gemma3-270m",
    "profile": "default",
    "dtype": "bfloat16",
    "seed": 0,
    "methods": list(ARMS),
}
ENVIRONMENT = {
    "python": "3.11.9",
    "processor": "Some CPU",
    "cores": 2,
    "packages": {"jax": "0.10.2", "flax": "0.12.8", "scann": None},
}


@pytest.fixture(scope="session")
def results(arms: dict[str, Arm]) -> dict:
    return collect(arms, config=CONFIG, environment=ENVIRONMENT)


@pytest.fixture(scope="session")
def partial_results(arms: dict[str, Arm]) -> dict:
    """The first rows of a run: references and rag stand, nothing is trained, latency of rag is not
    yet measured."""
    done = {name: arms[name] for name in ("base", "oracle")}
    done["rag"] = dataclasses.replace(
        arms["rag"], cost=dataclasses.replace(arms["rag"].cost, latency_seconds={})
    )
    return collect(
        done,
        config=CONFIG,
        environment=ENVIRONMENT,
        pending=[name for name in ARMS if name not in done],
    )
