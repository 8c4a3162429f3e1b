"""The protocol of a method: `learn` from the corpus, `answer` questions, say what it `cost`."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence

from kafjax.core import trees
from kafjax.core.records import Passage, Prediction, Question
from kafjax.evaluation.cost import Cost
from kafjax.evaluation.score import score
from kafjax.generation import Generation, Prefix, Sampling
from kafjax.hub.text import Prompt
from kafjax.methods.lab import Lab


class Method(abc.ABC):
    """One way to give a model the knowledge of a corpus.

    Attributes:
      note: what is shown under the table.
      activity: what the method does before it answers, for progress.
      searches: whether its passages come from an index, so that a miss may be the reader's or the index's.
    """

    note = ""
    activity = "learning"
    searches = False

    def __init__(self, lab: Lab, name: str):
        self.lab, self.name = lab, name
        self._prefixes: dict[Prompt, Prefix] = {}

    def check(self) -> None:  # noqa: B027 (nothing to check is a good default)
        """Raises `UserError` early for settings and models that `learn` would refuse."""

    def questions(self) -> list[Question]:
        """Returns the questions of the corpus that the method can answer, retention last."""
        return [*self.lab.corpus.questions, *self.lab.corpus.retention]

    @property
    def is_trained(self) -> bool:
        """True if training has been done already, so that `learn` is quick."""
        return True

    def learn(self) -> None:  # noqa: B027 (nothing to learn is a good default)
        """Learns the corpus. The result is kept in `lab.folder` and found there the next time."""

    @property
    def params(self) -> trees.Tree:
        """The weights that answer."""
        return self.lab.params

    @abc.abstractmethod
    def answer(self, questions: Sequence[Question], on_progress: Callable[[int], None] = lambda n: None) -> list[Prediction]:
        """Answers questions, in their order, with scores. Call `learn` before."""

    def cost(self) -> Cost:
        """Returns the cost of learning and of keeping its result. The cost of asking is measured from predictions."""
        return Cost()

    def generate(
        self, prefix: Prompt, prompts: Sequence[Prompt], max_new_tokens: int, on_progress: Callable[[int], None] = lambda n: None
    ) -> list[Generation]:
        """Generates one greedy line for each prompt. All begin with `prefix`, whose cache is kept."""
        sampling = Sampling(max_new_tokens=max_new_tokens, seed=self.lab.settings.seed)
        return self.lab.generator.generate(self.params, prompts, sampling, self.prefix(prefix), on_progress)

    def prefix(self, text: Prompt) -> Prefix:
        """The cache of a beginning that many prompts share, computed with these weights on first use."""
        if text not in self._prefixes:
            self._prefixes[text] = self.lab.generator.prefix(self.params, text)
        return self._prefixes[text]

    def prediction(
        self, question: Question, replies: Sequence[Generation], passages: Sequence[Passage] = (), **seconds: float
    ) -> Prediction:
        """Makes the record of an answer, scored if the right one is known. The last of `replies` is the answer; all are on the bill."""
        prefill, decode = sum(r.prefill_seconds for r in replies), sum(r.decode_seconds for r in replies)
        prediction = Prediction(
            id=question.id,
            method=self.name,
            split=question.split,
            question=question.text,
            answer=replies[-1].text.strip(),
            answers=question.answers,
            passages=tuple(passage.id for passage in passages),
            gold_passages=question.passages,
            prompt_tokens=sum(r.prompt_tokens for r in replies),
            cached_tokens=sum(r.cached_tokens for r in replies),
            output_tokens=sum(r.output_tokens for r in replies),
            calls=len(replies),
            cut=not replies[-1].ended,
            seconds={**seconds, "prefill": prefill, "decode": decode},
            subject=question.subject,
        )
        return score(prediction) if question.answers else prediction


class ClosedBook(Method):
    """Answers from the weights alone."""

    def answer(self, questions, on_progress=lambda n: None):
        write = self.lab.prompts
        prompts = [write.closed_book(question.text) for question in questions]
        replies = self.generate(write.closed_book_prefix(), prompts, self.lab.settings.generation.max_new_tokens, on_progress)
        return [self.prediction(question, [reply]) for question, reply in zip(questions, replies, strict=True)]
