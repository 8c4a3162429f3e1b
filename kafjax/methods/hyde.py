"""`hyde`: the model first writes a passage that would answer the question; that is searched with,
too (HyDE, Gao et al. 2022)."""

from __future__ import annotations

from kafjax.core.stopwatch import stages
from kafjax.methods.rag import RAG, Found


class HyDE(RAG):
    """Reads as `rag` does, and searches with the question and a passage that the model made up."""

    @property
    def note(self) -> str:
        return f"as rag, but the query is the question and a passage the model made up (of vectors, the mean); {super().note}"

    def calls(self, questions):
        """Returns what the language model writes for each question before anything is searched."""
        write = self.lab.prompts
        prompts = [write.hyde(question.text) for question in questions]
        return [
            [call]
            for call in self.generate(
                write.hyde_prefix(), prompts, self.lab.settings.generation.hyde_tokens
            )
        ]

    def find(self, questions, k):
        calls = self.calls(questions)
        with stages() as seconds:
            hits = self.lab.retriever.search(
                [q.text for q in questions], k, [call.text for (call,) in calls]
            )
        return Found(hits, calls, seconds)
