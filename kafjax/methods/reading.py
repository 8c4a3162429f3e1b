"""Weights trained to read: `reader` and `raft`, LoRA adapters that learn from training questions
behind their passages, and from no document.

    reader    each question behind the passage that answers it
    raft      behind --k passages: the one that answers at a random place among the nearest others, and in some examples
              only others (RAFT, Zhang et al. 2024, arXiv:2403.10131, section 3; replies are answers without reasoning)

`reader+rag` and `raft+rag` read with them. What they know of the subjects they are asked about is
in the passages alone: the subjects of training questions are others.
"""

from __future__ import annotations

from collections.abc import Sequence

from kafjax.core.errors import UserError
from kafjax.core.records import Passage, Question
from kafjax.corpus.facts import stream
from kafjax.methods.lora import LoRA
from kafjax.training import Example, answer_example

READING = ("reader", "raft")
"""Weights that learn to read."""
UNKNOWN = "unknown"
"""The reply that `raft_abstains` teaches where no passage answers; `evaluation.score.abstains`
counts it."""


class Reading(LoRA):
    """An adapter trained on questions behind passages. It keeps one passage for `reader`."""

    @property
    def spec(self):
        return self.lab.settings.spec

    @property
    def described(self) -> str:
        settings = self.lab.settings
        if self.name == "reader":
            behind = "the passage that answers"
        else:
            without = f"'{UNKNOWN}'" if settings.raft_abstains else "the answer all the same"
            behind = f"{settings.retrieval.k} passages, in {100 * settings.raft_gold:g}% with the one that answers, else {without}"
        return f"adapter of rank {self.spec.rank} trained to read questions about other subjects behind {behind}"

    def check(self):
        super().check()
        self.lab.check_retriever()
        if not any(question.passages for question in self.lab.corpus.training_questions):
            raise UserError(
                f"{self.name} learns to read from training questions that name a passage, and {self.lab.corpus.name} has none; choose another method"
            )

    def examples(self):
        lab = self.lab
        questions = [q for q in lab.corpus.training_questions if q.passages]
        by_id = {passage.id: passage for passage in lab.corpus.passages}
        gold = [[by_id[id] for id in question.passages] for question in questions]
        if self.name == "reader":
            others: list[list[Passage]] = [[] for _ in questions]
        else:
            wanted = lab.settings.retrieval.k + max(map(len, gold))
            hits = lab.retriever.search([question.text for question in questions], wanted)
            others = [
                [hit.passage for hit in of_question if hit.passage.id not in question.passages]
                for question, of_question in zip(questions, hits, strict=True)
            ]
        return [
            [
                self._example(question, passages, distractors, part)
                for question, passages, distractors in zip(questions, gold, others, strict=True)
            ]
            for part in range(max(1, lab.settings.document_parts))
        ]

    def _example(
        self, question: Question, gold: Sequence[Passage], others: Sequence[Passage], part: int
    ) -> Example:
        """Makes the example of a question in one of the lists that epochs take in turn: each draws
        anew."""
        lab, rng = self.lab, stream(self.lab.settings.seed, question.id, part, "reading")
        answers = self.name == "reader" or rng.random() < lab.settings.raft_gold
        k = lab.settings.retrieval.k
        if answers:
            passages = list(others[: k - 1])
            passages.insert(rng.randint(0, len(passages)), rng.choice(gold))
        else:
            passages = list(others[:k])
        write = lab.prompts
        asked = write.without_prefix(question.text, [passage.text for passage in passages])
        abstains = not answers and lab.settings.raft_abstains
        reply = UNKNOWN if abstains else question.answers[0]
        return answer_example(lab.tokenizer, asked, write.answer(reply))
