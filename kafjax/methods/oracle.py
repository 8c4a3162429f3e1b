"""`oracle`: a passage that answers the question is in the prompt. The reader's ceiling: no
retrieval can do better."""

from __future__ import annotations

from collections.abc import Sequence

from kafjax.core.progress import unshown
from kafjax.core.records import Passage, Question
from kafjax.methods.rag import Reader


class Oracle(Reader):
    """Reads a passage that the corpus names as an answer to the question."""

    activity = "answering"
    note = "one passage that states the answer in the prompt: what the reader could do with perfect retrieval"

    def questions(self):
        return [question for question in self.lab.corpus.questions if question.passages]

    def answer(self, questions, advance=unshown):
        return self.read(questions, self._passages(questions), 1, advance=advance)

    def weigh(self, questions, replies):
        prefix, prompts, _ = self.write(questions, self._passages(questions), 1)
        return self.likelihoods(prefix, prompts, replies)

    def _passages(self, questions: Sequence[Question]) -> list[list[Passage]]:
        by_id = {passage.id: passage for passage in self.lab.corpus.passages}
        return [[by_id[id] for id in question.passages[:1]] for question in questions]
