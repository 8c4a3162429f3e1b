"""Prompts as turns of a chat, for instruct models: worked examples are earlier turns, and the
question is the last one."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

from kafjax.hub.chat import ChatTemplate
from kafjax.hub.text import Marked
from kafjax.prompts.prompt import SHOTS, passage_lines
from kafjax.prompts.shots import Shot


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """Writes `prompt.Prompts` through a chat template.

    A prefix ends where the last token of the markup between the worked examples and the question
    ends: there every tokenizer starts anew, so that prefix and question have the tokens of the
    whole.
    """

    template: ChatTemplate
    shots: tuple[Shot, ...] = SHOTS

    def closed_book_prefix(self) -> Marked:
        return self._prefix((shot.question, shot.answer) for shot in self.shots)

    def closed_book(self, question: str) -> Marked:
        return self._last(question)

    def reading_prefix(self, n_passages: int, best_last: bool = True) -> Marked:
        return self._prefix(
            (_reading(shot.question, shot.passages[:n_passages], best_last), shot.answer)
            for shot in self.shots
        )

    def reading(self, question: str, passages: Sequence[str], best_last: bool = True) -> Marked:
        return self._last(_reading(question, passages, best_last))

    def hyde_prefix(self) -> Marked:
        return self._prefix((_hyde(shot.question), shot.passages[0]) for shot in self.shots)

    def hyde(self, question: str) -> Marked:
        return self._last(_hyde(question))

    def rewrite_prefix(self) -> Marked:
        return self._prefix((_rewrite(shot.question), shot.query) for shot in self.shots)

    def rewrite(self, question: str) -> Marked:
        return self._last(_rewrite(question))

    def without_prefix(self, question: str, passages: Sequence[str] = ()) -> Marked:
        asked = _reading(question, passages, best_last=True) if passages else question.strip()
        return self.template.asked([asked])

    def answer(self, text: str) -> Marked:
        return self.template.reply(text.strip())

    def _prefix(self, shots: Iterable[tuple[str, str]]) -> Marked:
        *parts, between, _, _ = self.template.asked([*itertools.chain(*shots), ""]).parts
        return Marked((*parts, between[: self.template.seam(between)]))

    def _last(self, content: str) -> Marked:
        *_, between, _, end = self.template.asked([""] * (2 * len(self.shots) + 1)).parts
        return Marked((between[self.template.seam(between) :], content.strip(), end))


def _reading(question: str, passages: Sequence[str], best_last: bool) -> str:
    return f"{passage_lines(passages, best_last)}Question: {question.strip()}"


def _hyde(question: str) -> str:
    return f"Write a passage that answers the question.\nQuestion: {question.strip()}"


def _rewrite(question: str) -> str:
    return (
        f"Write a query that a search engine finds the answer with.\nQuestion: {question.strip()}"
    )
