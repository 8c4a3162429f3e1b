"""Per-question scores.

Every score is in [0, 1] and is the best over the accepted answers. Text is compared after SQuAD's normalisation
(Rajpurkar et al. 2016): lower case, no ASCII punctuation, no articles, single spaces. The reply is cut at its first
newline before it is scored, so that no method gains by going on.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
import string
import unicodedata
from collections.abc import Collection, Sequence

from kafjax.core.records import Prediction

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """SQuAD's answer normalisation, after Unicode NFC: text that renders the same compares the same."""
    text = unicodedata.normalize("NFC", text).lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(reply: str, answers: Sequence[str]) -> float:
    """1.0 if the normalised reply equals a normalised answer."""
    return float(normalise(reply) in {normalise(answer) for answer in answers})


def token_f1(reply: str, answers: Sequence[str]) -> float:
    """Harmonic mean of token precision and recall (tokens counted with repetition), best over the answers.

    Where either side normalises to nothing, 1.0 if both do, else 0.0 (SQuAD 2.0's rule).
    """
    return max(_token_f1(normalise(reply).split(), normalise(answer).split()) for answer in answers)


def _token_f1(reply: list[str], gold: list[str]) -> float:
    if not reply or not gold:
        return float(reply == gold)
    common = (collections.Counter(reply) & collections.Counter(gold)).total()
    return 2 * common / (len(reply) + len(gold))


def contains(reply: str, answers: Sequence[str]) -> float:
    """1.0 if a normalised answer stands in the normalised reply as a run of whole tokens.

    "Rome" is in "It is Rome." but not in "Romeo". An answer that normalises to nothing is only in an empty reply.
    """
    tokens = f" {normalise(reply)} "
    return float(any(f" {normalise(answer)} " in tokens for answer in answers))


def recall_at_k(retrieved: Sequence[str], gold: Collection[str]) -> float:
    """1.0 if any gold passage is among the `k = len(retrieved)` passages.

    Gold passages each suffice alone, so this is the open-domain QA reading of recall@k (DPR's top-k accuracy, also called
    success@k), not the fraction of gold passages found.
    """
    return float(any(passage in gold for passage in retrieved))


def reciprocal_rank(retrieved: Sequence[str], gold: Collection[str]) -> float:
    """1 / rank of the first gold passage (ranks from 1, best first), 0.0 if there is none. Its mean is MRR@k."""
    return next((1 / rank for rank, passage in enumerate(retrieved, 1) if passage in gold), 0.0)


def ndcg(retrieved: Sequence[str], gold: Collection[str]) -> float:
    """Normalised discounted cumulative gain (Jarvelin & Kekalainen 2002) of `k = len(retrieved)` passages, relevant or not.

    A gold passage at rank r gains `1 / log2(r + 1)`; the sum is divided by that of the best order of all gold passages. 0.0 where
    there are no gold passages, or nothing was retrieved.
    """
    gains = sum(1 / math.log2(rank + 1) for rank, passage in enumerate(retrieved, 1) if passage in gold)
    best = sum(1 / math.log2(rank + 1) for rank in range(1, min(len(gold), len(retrieved)) + 1))
    return gains / best if best else 0.0


_NO_ANSWER = ("unknown", "not known", "i dont know", "i do not know", "not mentioned", "not stated", "not given", "no answer", "none")


def abstains(reply: str) -> bool:
    """True if the reply says nothing, or begins with one of the usual ways to say that the answer is not known."""
    said = f"{normalise(first_line(reply))} "
    return said == " " or said.startswith(tuple(f"{words} " for words in _NO_ANSWER))


def first_line(reply: str) -> str:
    """The reply up to its first newline, leading white space aside."""
    return reply.strip().partition("\n")[0]


def score(prediction: Prediction) -> Prediction:
    """Returns the prediction with `score` and `correct` filled.

    `correct` is `contains`: models answer in sentences as well as in bare names, and a bare-match rule would measure that habit.
    `score` holds `exact_match`, `f1`, `contains`, and, where passages were put in the prompt and gold ones are known,
    `recall_at_k` and `mrr` (the reciprocal rank). Raises `ValueError` if the prediction has no accepted answers.
    """
    if not prediction.answers:
        raise ValueError(f"question '{prediction.id}' has no accepted answers to score against")
    reply = first_line(prediction.answer)
    scores = {
        "exact_match": exact_match(reply, prediction.answers),
        "f1": token_f1(reply, prediction.answers),
        "contains": contains(reply, prediction.answers),
    }
    if prediction.passages and prediction.gold_passages:
        scores["recall_at_k"] = recall_at_k(prediction.passages, prediction.gold_passages)
        scores["mrr"] = reciprocal_rank(prediction.passages, prediction.gold_passages)
    return dataclasses.replace(prediction, correct=bool(scores["contains"]), score=scores)
