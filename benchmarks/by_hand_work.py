"""Writes the work of a comparison down for `benchmarks.by_hand`, whose process then needs no JAX:

    python -m benchmarks.by_hand_work FOLDER PROFILE

FOLDER/batches.npz holds the batches of the trainings in their order, packed. FOLDER/work.json holds
the learning rate of each step, the questions, the passages, the held-out texts, and the worked
examples in front of each kind of prompt.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np

from experiments import build
from experiments.configs.compare import PROFILES, Compare
from kafjax import hub
from kafjax.core.config import changed
from kafjax.core.rundir import write_json
from kafjax.corpus import open_corpus
from kafjax.methods import Settings
from kafjax.methods.examples import training_examples
from kafjax.training.loop import batches_of
from kafjax.training.optimizers import rate, warmup_steps


def write(folder: Path, profile: str) -> None:
    config = changed(Compare(), **PROFILES[profile])
    name = config.model.model
    tokenizer, model = hub.tokenizer(name), hub.describe_decoder(name)
    corpus = open_corpus(config.corpus, config.settings.seed)
    config = build.with_limit(config, corpus, tokenizer, label="by hand")
    settings = dataclasses.replace(config.settings, document_parts=config.corpus.document_parts)
    _, asked = build.asked_through(None, model, tokenizer)
    prompts = build.suited(asked, build.asked_of(corpus))
    variants = training_examples(corpus, tokenizer, settings, model.config.text_end, prompts)
    batches = batches_of(variants, settings.train, 1)
    made = [batches[step] for step in range(len(batches))]
    np.savez(
        folder / "batches.npz",
        tokens=np.stack([batch.tokens_BxT for batch in made]),
        positions=np.stack([batch.positions_BxT for batch in made]),
        places=np.stack([batch.places_SxN[0] for batch in made]),
        targets=np.stack([batch.targets_SxN[0] for batch in made]),
        weights=np.stack([batch.weights_SxN[0] for batch in made]),
    )
    texts = {passage.id: passage.text for passage in corpus.passages}
    write_json(
        folder / "work.json",
        {
            "model": str(hub.folder_of(name)),
            "rates": {"lora": rates(settings, settings.lr_lora, len(made)),
                      "full": rates(settings, settings.lr_full, len(made))},
            "rank": settings.spec.rank,
            "alpha": settings.spec.alpha,
            "freeze_embedding": settings.train.freeze_embedding,
            "clip_norm": settings.train.clip_norm,
            "questions": [
                {
                    "text": question.text,
                    "answers": list(question.answers),
                    "gold": [texts[id] for id in question.passages],
                    "retention": question in corpus.retention,
                }
                for question in (*corpus.questions, *corpus.retention)
            ],
            "passages": list(texts.values()),
            "held_out": list(corpus.held_out_texts),
            "end": model.config.text_end,
            "k": settings.retrieval.k,
            "limit": settings.generation.limit,
            "hyde_tokens": settings.generation.hyde_tokens,
            "batch": settings.generation.batch,
            "latency_queries": config.latency_queries,
            "prefixes": {
                "closed": prompts.closed_book_prefix(),
                "oracle": prompts.reading_prefix(1),
                "reading": prompts.reading_prefix(settings.retrieval.k),
                "hyde": prompts.hyde_prefix(),
            },
        },
    )  # fmt: skip


def rates(settings: Settings, peak: float, steps: int) -> list[float]:
    """The learning rate of each step."""
    train = settings.train
    warmup = warmup_steps(steps, train.warmup_fraction)
    return [float(rate(i, peak, warmup, steps, train.floor_fraction)) for i in range(steps)]


if __name__ == "__main__":
    write(Path(sys.argv[1]), sys.argv[2])
