"""`rewrite`: the model first writes a query, which is searched with in place of the question (Ma et
al. 2023, "Query Rewriting for Retrieval-Augmented Large Language Models", arXiv:2305.14283)."""

from __future__ import annotations

from collections.abc import Sequence

from kafjax.core.records import Question
from kafjax.core.stopwatch import stages
from kafjax.generation import Generation
from kafjax.methods.rag import RAG, Found


class Rewrite(RAG):
    """Reads as `rag` does, and searches with a query that the model wrote. An empty one leaves the
    question."""

    @property
    def note(self) -> str:
        return f"as rag, but the query is one that the model wrote for the question; {super().note}"

    def calls(self, questions: Sequence[Question]) -> list[list[Generation]]:
        """Returns what the language model writes for each question before anything is searched."""
        write = self.lab.prompts
        prompts = [write.rewrite(question.text) for question in questions]
        limit = self.lab.settings.generation.hyde_tokens
        return [[call] for call in self.generate(write.rewrite_prefix(), prompts, limit)]

    def find(self, questions: Sequence[Question], k: int) -> Found:
        calls = self.calls(questions)
        queries = [
            call.text.strip() or question.text
            for question, (call,) in zip(questions, calls, strict=True)
        ]
        with stages() as seconds:
            hits = self.lab.retriever.search(queries, k)
        return Found(hits, calls, seconds)
