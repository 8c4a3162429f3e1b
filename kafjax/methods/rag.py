"""`rag`: the passages nearest to the question are put in the prompt (Lewis et al. 2020, with a
frozen reader)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from kafjax.core import trees
from kafjax.core.progress import Advance, say, unshown
from kafjax.core.records import Passage, Prediction, Question
from kafjax.core.stopwatch import stages
from kafjax.evaluation.cost import Cost
from kafjax.generation import Generation
from kafjax.hub.text import Prompt
from kafjax.methods.lab import Lab
from kafjax.methods.method import Method
from kafjax.prompts import prompt
from kafjax.retrieval.folder import size_on_disk
from kafjax.retrieval.retriever import Hit


class Reader(Method):
    """Answers with passages in the prompt; where they come from is up to the method. `weights` says
    whose weights read."""

    def __init__(self, lab: Lab, name: str, weights: Method):
        super().__init__(lab, name)
        self.weights = weights

    def check(self) -> None:
        self.weights.check()

    @property
    def is_trained(self) -> bool:
        return self.weights.is_trained

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
        advance: Advance = unshown,
        **seconds: float,
    ) -> list[Prediction]:
        """Answers each question from its passages, best first. `earlier` are calls already made for
        it, `seconds` stages already run."""
        prefix, prompts, fitted = self.write(questions, passages, n_passages)
        replies = self.generate(prefix, prompts, self.lab.settings.generation.limit, advance)
        earlier = earlier or [[]] * len(questions)
        return [
            self.prediction(question, [*before, reply], found[:n_kept], **seconds)
            for question, reply, found, n_kept, before in zip(
                questions, replies, passages, fitted, earlier, strict=True
            )
        ]

    def write(
        self,
        questions: Sequence[Question],
        passages: Sequence[Sequence[Passage]],
        n_passages: int,
    ) -> tuple[Prompt, list[Prompt], list[int]]:
        """Writes the prompts of questions behind their passages, best first. Returns what all begin
        with, the prompts, and how many passages of each the model's context holds."""
        generator, settings, write = self.lab.generator, self.lab.settings, self.lab.prompts
        best_last = settings.retrieval.best_last
        prefix = write.reading_prefix(n_passages, best_last)
        reading = functools.partial(write.reading, best_last=best_last)
        room = (
            self.lab.model.config.max_length
            - settings.generation.limit
            - generator.count(prefix)
            - 1
        )
        fitted = [
            prompt.fit(question.text, [p.text for p in found], room, generator.count, reading)
            for question, found in zip(questions, passages, strict=True)
        ]
        if cut := sum(
            tuple(p.text for p in found) != kept
            for found, kept in zip(passages, fitted, strict=True)
        ):
            context = f"the model's context of {self.lab.model.config.max_length} tokens"
            say(
                self.name,
                f"{cut} of {len(fitted)} prompts did not fit {context}; passages were dropped or cut",
            )
        prompts = [
            reading(question.text, kept) for question, kept in zip(questions, fitted, strict=True)
        ]
        return prefix, prompts, [len(kept) for kept in fitted]


@dataclasses.dataclass(frozen=True)
class Found:
    """Passages found for each question: `hits`, best first, the `calls` of the language model
    before, and `seconds` by stage."""

    hits: list[list[Hit]]
    calls: list[list[Generation]]
    seconds: dict[str, float]


class RAG(Reader):
    """Reads the passages that the lab's retriever finds for the question."""

    searches = True

    @property
    def note(self) -> str:
        whose = "" if self.weights.name == "base" else f"{self.weights.name}'s weights read; "
        k = self.lab.settings.retrieval.k
        place = "last" if self.lab.settings.retrieval.best_last else "first"
        return f"{whose}{k} passages in the prompt, the nearest {place}, found by {self.lab.retriever_note}"

    def check(self) -> None:
        super().check()
        self.lab.check_retriever()

    def learn(self) -> None:
        # builds the store or loads it
        n_passages, k = len(self.lab.store), self.lab.settings.retrieval.k
        if k > n_passages:
            say(
                self.name,
                f"k={k} is more than the {n_passages} passages there are: all of them go into the prompt",
            )
        super().learn()

    def find(self, questions: Sequence[Question], k: int) -> Found:
        """Searches for each question."""
        with stages() as seconds:
            hits = self.lab.retriever.search([question.text for question in questions], k)
        return Found(hits, [[] for _ in questions], seconds)

    def answer(self, questions, advance=unshown):
        k = self.lab.settings.retrieval.k
        found = self.find(questions, k)
        passages = [[hit.passage for hit in hits] for hits in found.hits]
        return self.read(questions, passages, k, found.calls, advance, **found.seconds)

    def weigh(self, questions, replies):
        k = self.lab.settings.retrieval.k
        passages = [[hit.passage for hit in hits] for hits in self.find(questions, k).hits]
        prefix, prompts, _ = self.write(questions, passages, k)
        return self.likelihoods(prefix, prompts, replies)

    def cost(self) -> Cost:
        cost, record = super().cost(), self.lab.index_record
        return dataclasses.replace(
            cost,
            index_seconds=record.seconds,
            index_flops_formula=record.flops,
            peak_memory_bytes=max(cost.peak_memory_bytes or 0, record.peak_memory_bytes),
            artifact_bytes=cost.artifact_bytes + size_on_disk(self.lab.store_folder),
        )
