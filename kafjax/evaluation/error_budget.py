"""Error budget: each question of an arm is put down to exactly one cause, so the parts sum to
100%."""

from __future__ import annotations

import collections
from collections.abc import Sequence

from kafjax.core.records import Prediction
from kafjax.evaluation.clustered import mean_of_questions
from kafjax.evaluation.intervals import Interval

FROM_PASSAGES = "from passages"
EITHER = "either"
FROM_WEIGHTS = "from weights"
MISLED = "misled"
RETRIEVAL_MISS = "retrieval miss"
DISTRACTOR_HARM = "distractor harm"
READER_MISS = "reader miss"
GOLD_UNUSED = "gold unused"
NOT_LEARNED = "not learned"

CAUSES = {
    FROM_PASSAGES: "right with a gold passage in the prompt, and the same weights alone are wrong (or were not asked)",
    EITHER: "right with a gold passage in the prompt, and the same weights alone are right, too",
    FROM_WEIGHTS: "right, no gold passage was in the prompt",
    MISLED: "wrong with passages in the prompt, though the same weights alone are right",
    RETRIEVAL_MISS: "wrong, no gold passage among those retrieved",
    DISTRACTOR_HARM: "wrong with a gold passage in the prompt, though the same weights are right when given it alone",
    READER_MISS: "wrong with a gold passage in the prompt, and wrong when given it alone",
    GOLD_UNUSED: "wrong with a gold passage in the prompt; what the same weights do with it alone was not measured",
    NOT_LEARNED: "wrong, answered from the weights alone",
}


def retrieves(predictions: Sequence[Prediction]) -> bool:
    """True if the arm puts passages in prompts (one that found none for a single question still
    retrieves)."""
    return any(prediction.passages for prediction in predictions)


def attribute(
    predictions: Sequence[Prediction],
    oracle: Sequence[Prediction] = (),
    alone: Sequence[Prediction] = (),
) -> dict[str, str]:
    """Question id -> cause, a key of `CAUSES`, for each question of one arm.

    In a retrieving arm, questions with no known gold passage cannot be attributed and are left out.

    Args:
      oracle: predictions of the same weights with only a gold passage in the prompt. Only questions
        that the arm got wrong with a gold passage in the prompt are looked up.
      alone: predictions of the same weights without passages, if they were asked so.

    Raises `ValueError` if a question occurs twice.
    """
    oracle_correct, knows = _by_id(oracle), _by_id(alone)
    retrieving = retrieves(predictions)
    considered = [p for p in predictions if p.gold_passages or not retrieving]
    _by_id(considered)
    return {
        p.id: _cause(p, retrieving, oracle_correct.get(p.id), knows.get(p.id, False))
        for p in considered
    }


def _cause(
    prediction: Prediction, retrieving: bool, oracle_correct: bool | None, knows: bool
) -> str:
    has_gold = not set(prediction.passages).isdisjoint(prediction.gold_passages)
    if prediction.correct:
        return FROM_WEIGHTS if not has_gold else EITHER if knows else FROM_PASSAGES
    if not retrieving:
        return NOT_LEARNED
    if knows:
        return MISLED
    if not has_gold:
        return RETRIEVAL_MISS
    if oracle_correct is None:
        return GOLD_UNUSED
    return DISTRACTOR_HARM if oracle_correct else READER_MISS


def error_budget(
    predictions: Sequence[Prediction],
    oracle: Sequence[Prediction] = (),
    alone: Sequence[Prediction] = (),
) -> dict[str, Interval]:
    """Share of each cause among the attributed questions, for the causes that are possible in this
    arm; they sum to 1. Intervals are over subjects. See `attribute`."""
    causes = attribute(predictions, oracle, alone)
    attributed = [p for p in predictions if p.id in causes]
    found = set(causes.values())
    possible = (
        {FROM_PASSAGES, FROM_WEIGHTS, RETRIEVAL_MISS}
        if retrieves(predictions)
        else {FROM_WEIGHTS, NOT_LEARNED}
    )
    if retrieves(predictions):
        possible |= {DISTRACTOR_HARM, READER_MISS} if oracle else {GOLD_UNUSED}
        possible |= {EITHER, MISLED} if alone else set()
    return {
        cause: mean_of_questions(attributed, [float(causes[p.id] == cause) for p in attributed])
        for cause in CAUSES
        if cause in possible | found
    }


def _by_id(predictions: Sequence[Prediction]) -> dict[str, bool]:
    correct = {p.id: p.correct for p in predictions}
    if len(correct) != len(predictions):
        twice, _ = collections.Counter(p.id for p in predictions).most_common(1)[0]
        raise ValueError(f"question '{twice}' occurs more than once in one arm")
    return correct
