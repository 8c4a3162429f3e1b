"""`hyde`: the model first writes a passage that would answer the question; that is embedded too (HyDE, Gao et al. 2022)."""

from __future__ import annotations

import numpy as np

from kafjax.methods.rag import RAG


class HyDE(RAG):
    @property
    def note(self) -> str:
        return f"as rag, but the query is the mean of the question and a passage the model made up; {super().note}"

    def calls(self, questions):
        write = self.lab.prompts
        prompts = [write.hyde(question.text) for question in questions]
        return [[call] for call in self.generate(write.hyde_prefix(), prompts, self.lab.settings.generation.hyde_tokens)]

    def vectors(self, questions, calls):
        # Equation 8 of the paper with one hypothetical document: the mean of its vector and the question's.
        mean_QxD = super().vectors(questions, calls) + self.lab.embedder.embed_documents([call.text for (call,) in calls])
        return mean_QxD / np.maximum(np.linalg.norm(mean_QxD, axis=-1, keepdims=True), 1e-12)
