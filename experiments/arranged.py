"""Prompts with the same passages arranged in several ways, answered from one prefill for all that
begin alike."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from kafjax.core.records import Passage, Prediction, Question
from kafjax.evaluation.depth import COPIES, NO_GOLD, copies
from kafjax.generation import Sampling
from kafjax.hub.text import Prompt
from kafjax.methods import Lab
from kafjax.methods.rag import RAG, Found
from kafjax.prompts import prompt
from kafjax.retrieval import Hit

SHOTS = 3
"""Passages in each worked example."""


def write_prompt(
    lab: Lab, question: Question, passages: Sequence[Passage]
) -> tuple[Prompt, tuple[Passage, ...]]:
    """Writes the question behind passages, the first one first. Returns the prompt and the passages
    that the model's context holds."""
    generator, write = lab.generator, lab.prompts
    room = (
        lab.model.config.max_length
        - lab.settings.generation.limit
        - generator.count(prefix_of(lab))
        - 1
    )
    reading = functools.partial(write.reading, best_last=False)
    kept = prompt.fit(question.text, [p.text for p in passages], room, generator.count, reading)
    return reading(question.text, kept), tuple(passages[: len(kept)])


def prefix_of(lab: Lab) -> Prompt:
    """The worked examples before every question, whatever its depth."""
    return lab.prompts.reading_prefix(SHOTS, best_last=False)


def at_depths(hits: Sequence[Hit], depths: Sequence[int]) -> dict[str, list[Passage]]:
    """Lists the first k passages for each depth, by the name of the depth."""
    return {f"k={k}": [hit.passage for hit in hits[:k]] for k in depths}


def at_places(
    gold: Passage | None, others: Sequence[Passage], places: int
) -> dict[str, list[Passage]]:
    """Puts the gold passage at each place among others, best first, and leaves it out. Empty where
    there are too few others."""
    others = list(others[:places])
    if not (gold and places and len(others) == places):
        return {}
    put = {str(i + 1): [*others[:i], gold, *others[i : places - 1]] for i in range(places)}
    return {**put, NO_GOLD: others}


def answer_shared(
    method: RAG,
    questions: Sequence[Question],
    found: Found,
    arranged: Sequence[dict[str, list[Passage]]],
) -> list[list[Prediction]]:
    """Answers each question once for each arrangement of its passages, from one prefill for all
    that begin alike."""
    lab = method.lab
    written = [
        [(name, *write_prompt(lab, question, passages)) for name, passages in of_question.items()]
        for question, of_question in zip(questions, arranged, strict=True)
    ]
    sampling = Sampling(max_new_tokens=lab.settings.generation.limit, seed=lab.settings.seed)
    groups = [[asked for _, asked, _ in of_question] for of_question in written]
    replies = lab.generator.generate_branches(
        method.params, groups, sampling, method.prefix(prefix_of(lab))
    )
    answered = []
    for question, calls, of_question, of_reply in zip(
        questions, found.calls, written, replies, strict=True
    ):
        answered.append([])
        for (name, _, passages), reply in zip(of_question, of_reply, strict=True):
            # nothing is searched for no passage
            before, seconds = (calls, found.seconds) if passages else ([], {})
            prediction = method.prediction(question, [*before, reply], passages, **seconds)
            copied = float(copies(prediction.answer, [passage.text for passage in passages]))
            score = {**prediction.score, COPIES: copied}
            answered[-1].append(dataclasses.replace(prediction, method=name, score=score))
    return answered
