"""`rag`: the passages nearest to the question are put in the prompt (Lewis et al. 2020, with a frozen reader)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from kafjax.core import trees
from kafjax.core.records import Passage, Prediction, Question
from kafjax.evaluation.cost import Cost
from kafjax.generation import Generation
from kafjax.methods.lab import Lab
from kafjax.methods.method import Method
from kafjax.retrieval import prompt


class Reader(Method):
    """Answers with passages in the prompt; where they come from is up to the method. `weights` says whose weights read."""

    def __init__(self, lab: Lab, name: str, weights: Method):
        super().__init__(lab, name)
        self.weights = weights

    def learn(self) -> None:
        self.weights.learn()

    @property
    def params(self) -> trees.Tree:
        return self.weights.params

    def cost(self) -> Cost:
        return self.weights.cost()

    def read(
        self,
        questions: Sequence[Question],
        passages: Sequence[Sequence[Passage]],
        n_passages: int,
        earlier: Sequence[Sequence[Generation]] | None = None,
        on_progress: Callable[[int], None] = lambda n: None,
        **seconds: float,
    ) -> list[Prediction]:
        """Answers each question from its passages, best first. `earlier` are calls already made for it, `seconds` stages already run."""
        generator, settings = self.lab.generator, self.lab.settings
        prefix = prompt.reading_prefix(n_passages)
        room = self.lab.model.config.max_length - settings.max_new_tokens - generator.count(prefix) - 1
        fitted = [
            prompt.fit(question.text, [p.text for p in found], room, generator.count)
            for question, found in zip(questions, passages, strict=True)
        ]
        if cut := sum(tuple(p.text for p in found) != kept for found, kept in zip(passages, fitted, strict=True)):
            print(f"{self.name}: {cut} prompts were longer than the model's context; passages were dropped or cut", flush=True)
        prompts = [prompt.reading(question.text, kept) for question, kept in zip(questions, fitted, strict=True)]
        replies = self.generate(prefix, prompts, settings.max_new_tokens, on_progress)
        earlier = earlier or [[]] * len(questions)
        return [
            self.prediction(question, [*before, reply], found[: len(kept)], **seconds)
            for question, reply, found, kept, before in zip(questions, replies, passages, fitted, earlier, strict=True)
        ]


class RAG(Reader):
    @property
    def note(self) -> str:
        record = self.lab.index_record
        whose = "" if self.weights.name == "base" else f"{self.weights.name}'s weights read; "
        return f"{whose}{self.lab.settings.k} sentences in the prompt, the nearest last, found by {self.lab.embedder_name} + {record['engine']}"

    def learn(self) -> None:
        super().learn()
        _ = self.lab.store  # builds or loads it

    def vectors(self, questions: Sequence[Question]) -> tuple[np.ndarray, list[list[Generation]]]:
        """What is searched for, `[Q, D]`, and the calls of the language model made for it."""
        return self.lab.embedder.embed([question.text for question in questions]), [[] for _ in questions]

    def answer(self, questions, on_progress=lambda n: None):
        began = time.perf_counter()
        queries_QxD, calls = self.vectors(questions)
        # Calls of the language model are on the bill as prefill and decode.
        in_llm = sum(c.prefill_seconds + c.decode_seconds for c in {id(c): c for row in calls[:1] for c in row}.values())
        embedded = time.perf_counter()
        passages = self.lab.store.search(queries_QxD, self.lab.settings.k)
        searched = time.perf_counter()
        seconds = {"embed": max(embedded - began - in_llm, 0.0), "search": searched - embedded}
        return self.read(questions, passages, self.lab.settings.k, calls, on_progress, **seconds)

    def cost(self) -> Cost:
        cost, record = super().cost(), self.lab.index_record
        kept = sum(file.stat().st_size for file in Path(self.lab.folder / "index" / "store").rglob("*") if file.is_file())
        return dataclasses.replace(
            cost,
            index_seconds=record["seconds"],
            index_flops_formula=record["flops"],
            peak_memory_bytes=max(cost.peak_memory_bytes or 0, record["peak_memory_bytes"]),
            artifact_bytes=cost.artifact_bytes + kept,
        )
