"""`oracle`: a passage that answers the question is in the prompt. The reader's ceiling: no
retrieval can do better."""

from __future__ import annotations

from collections.abc import Sequence

from kafjax.core.progress import unshown
from kafjax.core.records import Passage, Question
from kafjax.methods.rag import Reader


class Oracle(Reader):
    """Reads what `rag` reads without the distractors: the same worked examples, and of the passages
    that answer the one that retrieval ranks first.

    Where none of them is retrieved, the first that the corpus names stands in.
    """

    activity = "answering"
    note = "the passage with the answer alone, behind the examples of rag: what the reader could do with perfect retrieval"

    def check(self):
        super().check()
        self.lab.check_retriever()

    def learn(self):
        super().learn()
        _ = self.lab.store  # builds it or loads it

    def questions(self):
        return [question for question in self.lab.corpus.questions if question.passages]

    def answer(self, questions, advance=unshown):
        k = self.lab.settings.retrieval.k
        return self.read(questions, self._passages(questions), k, advance=advance)

    def weigh(self, questions, replies):
        k = self.lab.settings.retrieval.k
        prefix, prompts, _ = self.write(questions, self._passages(questions), k)
        return self.likelihoods(prefix, prompts, replies)

    def _passages(self, questions: Sequence[Question]) -> list[list[Passage]]:
        lab = self.lab
        by_id = {passage.id: passage for passage in lab.corpus.passages}
        found = lab.retriever.search([q.text for q in questions], lab.settings.retrieval.k)
        gold = [
            next((hit.passage.id for hit in hits if hit.passage.id in q.passages), q.passages[0])
            for q, hits in zip(questions, found, strict=True)
        ]
        return [[by_id[id]] for id in gold]
