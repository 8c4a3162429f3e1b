"""Forecasts of trainings, told before they begin, and `--budget`, which picks what fits into a
time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from tokenizers import Tokenizer

from experiments.configs.compare import Compare
from kafjax.core.config import Config, changed, leaves
from kafjax.core.progress import say, waiting
from kafjax.core.records import Corpus
from kafjax.corpus import CorpusConfig
from kafjax.lora.spec import VARIANTS, Spec
from kafjax.methods import BASE, READING, parts, regimes
from kafjax.methods.examples import training_examples
from kafjax.models import Decoder
from kafjax.parallel import make_mesh
from kafjax.prompts.prompt import Prompts
from kafjax.training.forecast import Forecast, forecast, measure, read_seconds, show_seconds

C = TypeVar("C", bound=Config)
FEWEST_PASSES = 4
"""Passes below which a generated corpus loses subjects instead: facts that are seen less often are
hardly learned."""
FEWEST_SUBJECTS = 4


def of_weights(
    names: Sequence[str],
    config: Compare,
    corpus: Corpus,
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Prompts,
) -> dict[str, Forecast]:
    """Forecasts the training of each of the weights of some methods, on the machine that this
    is."""
    settings = dataclasses.replace(config.settings, document_parts=config.corpus.document_parts)
    # what learns to read is packed only when passages are found
    weights = [
        name
        for name in dict.fromkeys(parts(name)[0] for name in names)
        if name not in (BASE, *READING)
    ]
    if not weights:
        return {}
    variants = {}
    with waiting("compare", "packing what is trained on", after=5.0):
        for regime in dict.fromkeys(regimes.split(name)[1] for name in weights):
            read, how = regimes.in_regime(corpus, settings, regime)
            variants[regime] = training_examples(
                read, tokenizer, how, model.config.text_end, prompts
            )
    mesh = make_mesh()
    speed = measure(model, settings.train, mesh)

    def spec(name: str) -> Spec | None:
        kind, _ = regimes.split(name)
        return None if kind == "full" else dataclasses.replace(settings.spec, **VARIANTS[kind])

    return {
        name: forecast(
            model,
            variants[regimes.split(name)[1]],
            settings.train,
            mesh,
            speed,
            spec(name),
        )
        for name in weights
    }


def tell(label: str, forecasts: Mapping[str, Forecast], advice: str) -> None:
    """Says what is going to be trained and how to have less of it."""
    for name, expected in forecasts.items():
        say(label, f"{name} trains for {expected}")
    if forecasts:
        say(label, advice)


def within(config: C, budget: str, forecasts: Mapping[str, Forecast], *, label: str) -> C:
    """Returns the configuration with as many passes, and subjects of a generated corpus, as
    `budget` holds, and no budget any more.

    Args:
      config: an experiment with a corpus and settings of training.
      budget: a time such as `20m` for all of `forecasts`, which are about `config` as it is.

    Raises:
      UserError: a budget that is no time.
    """
    most, needed = read_seconds(budget), sum(expected.seconds for expected in forecasts.values())
    # Rounded, so that a start that is repeated picks the same and resumes.
    share = 2 ** (math.floor(2 * math.log2(most / needed)) / 2) if needed else 1.0
    if share >= 1:
        say(label, f"--budget={budget}: all of it fits, about {show_seconds(needed)}")
        return changed(config, budget=None)
    steps = min(expected.steps for expected in forecasts.values())
    chosen = _chosen({leaf.flag: leaf.of(config) for leaf in leaves(config)}, share, steps)
    told = " ".join(f"--{name}={value}" for name, value in chosen.items())
    say(label, f"--budget={budget}: {told} fit; all would take about {show_seconds(needed)}")
    return changed(config, **chosen, budget=None)


def _chosen(values: Mapping[str, Any], share: float, steps: int) -> dict[str, int]:
    """Picks values by flag that come to `share` of the `steps` that `values` come to, or less."""
    generated, subjects = CorpusConfig(corpus=values["corpus"]).is_generated, values["subjects"]
    if values["steps"] is None:
        while (
            generated
            and _passes(values, share, subjects) < FEWEST_PASSES
            and subjects // 2 >= FEWEST_SUBJECTS
        ):
            subjects //= 2
        fewer = {"subjects": subjects} if subjects < values["subjects"] else {}
        if passes := _passes(values, share, subjects):
            return {**fewer, "epochs": passes}
    return {"steps": max(1, math.floor(steps * share))}


def _passes(values: Mapping[str, Any], share: float, subjects: int) -> int:
    return min(
        math.floor(values["epochs"] * share * values["subjects"] / subjects), values["epochs"]
    )
