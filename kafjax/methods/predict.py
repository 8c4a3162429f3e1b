"""The record of an answer: what was asked and said, from which passages, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence

from kafjax.core.records import Passage, Prediction, Question
from kafjax.evaluation.score import score
from kafjax.generation import Generation


def prediction(
    method: str,
    question: Question,
    replies: Sequence[Generation],
    passages: Sequence[Passage] = (),
    **seconds: float,
) -> Prediction:
    """Makes the record of an answer, scored if the right one is known. The last of `replies` is the
    answer; all are on the bill."""
    prefill, decode = (
        sum(r.prefill_seconds for r in replies),
        sum(r.decode_seconds for r in replies),
    )
    made = Prediction(
        id=question.id,
        method=method,
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
        prompts=tuple(reply.prompt for reply in replies),
    )
    return score(made) if question.answers else made
