"""The protocol of a method: `learn` from the corpus, `answer` questions, say what it `cost`."""

from __future__ import annotations

import abc
from collections.abc import Sequence

from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.core.progress import Advance, unshown
from kafjax.core.records import Passage, Prediction, Question
from kafjax.evaluation.cost import Cost
from kafjax.generation import Generation, Prefix, Sampling
from kafjax.hub.text import Prompt
from kafjax.methods.lab import Lab
from kafjax.methods.predict import prediction


class Method(abc.ABC):
    """One way to give a model the knowledge of a corpus.

    Attributes:
      note: what is shown under the table.
      activity: what the method does before it answers, for progress.
      searches: whether its passages come from an index, so that a miss may be the reader's or the
        index's.
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
    def answer(self, questions: Sequence[Question], advance: Advance = unshown) -> list[Prediction]:
        """Answers questions, in their order, with scores. Call `learn` before."""

    def weigh(
        self, questions: Sequence[Question], replies: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """Computes the log-likelihood (nats) of some replies to each question, their end included,
        behind the prompt that `answer` asks with. Call `learn` before.

        Raises:
          UserError: the method has no such prompt.
        """
        raise UserError(f"{self.name} cannot tell how likely a reply is")

    def cost(self) -> Cost:
        """Returns the cost of learning and of keeping its result. The cost of asking is measured
        from predictions."""
        return Cost()

    def generate(
        self,
        prefix: Prompt,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        advance: Advance = unshown,
    ) -> list[Generation]:
        """Generates one greedy line for each prompt. All begin with `prefix`, whose cache is
        kept."""
        sampling = Sampling(max_new_tokens=max_new_tokens, seed=self.lab.settings.seed)
        return self.lab.generator.generate(
            self.params, prompts, sampling, self.prefix(prefix), advance
        )

    def likelihoods(
        self, prefix: Prompt, prompts: Sequence[Prompt], replies: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """Computes the log-likelihood (nats) of some replies to each prompt. All begin with
        `prefix`."""
        write = self.lab.prompts
        written = [[write.answer(text) for text in of_prompt] for of_prompt in replies]
        return self.lab.generator.log_likelihoods(
            self.params, prompts, written, self.prefix(prefix)
        )

    def prefix(self, text: Prompt) -> Prefix:
        """The cache of a beginning that many prompts share, computed with these weights on first
        use."""
        if text not in self._prefixes:
            self._prefixes[text] = self.lab.generator.prefix(self.params, text)
        return self._prefixes[text]

    def prediction(
        self,
        question: Question,
        replies: Sequence[Generation],
        passages: Sequence[Passage] = (),
        **seconds: float,
    ) -> Prediction:
        """Makes the record of an answer of this method; see `prediction`."""
        return prediction(self.name, question, replies, passages, **seconds)


class ClosedBook(Method):
    """Answers from the weights alone."""

    def answer(self, questions, advance=unshown):
        replies = self.generate(
            *self._asked(questions), self.lab.settings.generation.limit, advance
        )
        return [
            self.prediction(question, [reply])
            for question, reply in zip(questions, replies, strict=True)
        ]

    def weigh(self, questions, replies):
        return self.likelihoods(*self._asked(questions), replies)

    def _asked(self, questions: Sequence[Question]) -> tuple[Prompt, list[Prompt]]:
        write = self.lab.prompts
        return write.closed_book_prefix(), [write.closed_book(q.text) for q in questions]
