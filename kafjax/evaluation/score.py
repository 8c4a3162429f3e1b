"""Per-question scores.

Every score is in [0, 1] and is the best over the accepted answers. The reply is cut at its first
newline before it is scored, so that no method gains by going on. Texts are compared after one of
two normalisations:

  SQuAD's (Rajpurkar et al. 2016)   lower case, no ASCII punctuation, no articles, single spaces: `exact_match` and `token_f1`
  of any script                     compatible forms made one (NFKC), no case, no punctuation of any script, no articles, single spaces:
                                    `contains`, which says what is correct
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
import string
import unicodedata
from collections.abc import Collection, Sequence

import regex

from kafjax.core.records import Prediction
from kafjax.core.words import UNSPACED

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)

# Punctuation and quotes, ASCII's symbols (SQuAD takes them away, too), other currencies and accents
# that stand alone, and what is not seen: joiners, direction marks, soft hyphens.
_MARKS = rf"\p{{P}}\p{{Sc}}\p{{Sk}}\p{{Cf}}{re.escape(string.punctuation)}"
# Between scripts without blanks a mark divides ("\u6771\u4eac\u3001\u5927\u962a"); elsewhere it
# vanishes, as an apostrophe does.
_DIVIDING = regex.compile(rf"(?<=[{UNSPACED}])[{_MARKS}]+|[{_MARKS}]+(?=[{UNSPACED}])")
_VANISHING = regex.compile(rf"[{_MARKS}]+")
# Katakana is written in whole words of its own, which do not end within a run of it. Its marks of
# sound and length belong to it.
_KATAKANA = regex.compile(r"[\p{Katakana}\u30fc]")
_UNDIVIDED = regex.compile(rf"[[{UNSPACED}]--[\p{{Katakana}}\u30fc]]", regex.V1)
_COMBINING = regex.compile(r"\p{M}")
_HANGUL = regex.compile(r"\p{Hangul}")


def normalise(text: str) -> str:
    """SQuAD's answer normalisation, after Unicode NFC: text that renders the same compares the
    same."""
    text = unicodedata.normalize("NFC", text).lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def normalise_any(text: str) -> str:
    """Normalises text of any script as SQuAD does English: its punctuation and quotes vanish as
    ASCII's do."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = _VANISHING.sub("", _DIVIDING.sub(" ", text))
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(reply: str, answers: Sequence[str]) -> float:
    """1.0 if the normalised reply equals a normalised answer."""
    return float(normalise(reply) in {normalise(answer) for answer in answers})


def token_f1(reply: str, answers: Sequence[str]) -> float:
    """Harmonic mean of token precision and recall (tokens counted with repetition), best over the
    answers.

    Where either side normalises to nothing, 1.0 if both do, else 0.0 (SQuAD 2.0's rule).
    """
    return max(_token_f1(normalise(reply).split(), normalise(answer).split()) for answer in answers)


def _token_f1(reply: list[str], gold: list[str]) -> float:
    if not reply or not gold:
        return float(reply == gold)
    common = (collections.Counter(reply) & collections.Counter(gold)).total()
    return 2 * common / (len(reply) + len(gold))


def contains(reply: str, answers: Sequence[str]) -> float:
    """1.0 if an answer stands in the reply as a run of whole words, both normalised by
    `normalise_any`.

    "Rome" is in "It is Rome." but not in "Romeo". Where a script puts no blanks between words, an
    answer may begin and end between any two of its letters, but not within a run of Katakana;
    Korean particles may follow a word. An answer that normalises to nothing is only in an empty
    reply. What matches exactly is contained.
    """
    said = normalise_any(reply)
    return float(
        any(_stands_in(normalise_any(answer), said) for answer in answers)
        or exact_match(reply, answers)
    )


def answers_in(text: str, answers: Sequence[str]) -> list[str]:
    """Returns the answers that stand in a text as `contains` reads it."""
    said = normalise_any(text)
    return [
        answer for answer in answers if (plain := normalise_any(answer)) and _stands_in(plain, said)
    ]


def _stands_in(answer: str, reply: str) -> bool:
    if not answer or not reply:
        return answer == reply
    at = reply.find(answer)
    while at >= 0:
        end = at + len(answer)
        before, after = reply[max(at - 1, 0) : at], reply[end : end + 1]
        if _divides(before, answer[0]) and (
            _divides(answer[-1], after) or _is_particle(answer[-1], after)
        ):
            return True
        at = reply.find(answer, at + 1)
    return False


def _divides(left: str, right: str) -> bool:
    """True if a word may end between two characters; "" is the end of the text."""
    if not left or not right or left == " " or right == " ":
        return True
    if _COMBINING.match(right):  # the mark of a letter
        return False
    if _UNDIVIDED.match(left) or _UNDIVIDED.match(right):
        return True
    return bool(_KATAKANA.match(left)) != bool(_KATAKANA.match(right))


def _is_particle(last: str, following: str) -> bool:
    return bool(_HANGUL.match(last) and _HANGUL.match(following))


def recall_at_k(retrieved: Sequence[str], gold: Collection[str]) -> float:
    """1.0 if any gold passage is among the `k = len(retrieved)` passages.

    Gold passages each suffice alone, so this is the open-domain QA reading of recall@k (DPR's top-k
    accuracy, also called success@k), not the fraction of gold passages found.
    """
    return float(any(passage in gold for passage in retrieved))


def reciprocal_rank(retrieved: Sequence[str], gold: Collection[str]) -> float:
    """1 / rank of the first gold passage (ranks from 1, best first), 0.0 if there is none. Its mean
    is MRR@k."""
    return next((1 / rank for rank, passage in enumerate(retrieved, 1) if passage in gold), 0.0)


def recall(retrieved: Sequence[str], gold: Collection[str]) -> float:
    """Share of the gold passages that are among the `k = len(retrieved)` passages: recall@k of
    trec_eval. 0.0 where there are no gold passages."""
    return len(set(retrieved) & set(gold)) / len(gold) if gold else 0.0


def average_precision(retrieved: Sequence[str], gold: Collection[str]) -> float:
    """Sum of the precisions at the ranks of the gold passages found, over the number of all gold
    passages. Its mean over questions is MAP@k. 0.0 where there are no gold passages."""
    ranks = [rank for rank, passage in enumerate(retrieved, 1) if passage in gold]
    precisions = sum(n / rank for n, rank in enumerate(ranks, 1))
    return precisions / len(gold) if gold else 0.0


def ndcg(retrieved: Sequence[str], gold: Collection[str], k: int | None = None) -> float:
    """Normalised discounted cumulative gain (Jarvelin & Kekalainen 2002) of at most `k` passages,
    relevant or not.

    A gold passage at rank r gains `1 / log2(r + 1)`; the sum is divided by that of the best order
    of all gold passages in `k` places. `k` is the number that was asked for (default: of those
    retrieved): a search by words may find fewer. 0.0 where there are no gold passages, or nothing
    was retrieved.
    """
    k = len(retrieved) if k is None else k
    gains = sum(
        1 / math.log2(rank + 1) for rank, passage in enumerate(retrieved[:k], 1) if passage in gold
    )
    best = sum(1 / math.log2(rank + 1) for rank in range(1, min(len(gold), k) + 1))
    return gains / best if best else 0.0


_NO_ANSWER = (
    "unknown",
    "not known",
    "i dont know",
    "i do not know",
    "not mentioned",
    "not stated",
    "not given",
    "no answer",
    "none",
)


def abstains(reply: str) -> bool:
    """True if the reply says nothing, or begins with one of the usual ways to say that the answer
    is not known."""
    said = f"{normalise(first_line(reply))} "
    return said == " " or said.startswith(tuple(f"{words} " for words in _NO_ANSWER))


def first_line(reply: str) -> str:
    """The reply up to its first newline, leading white space aside."""
    return reply.strip().partition("\n")[0]


def score(prediction: Prediction) -> Prediction:
    """Returns the prediction with `score` and `correct` filled.

    `correct` is `contains`: models answer in sentences as well as in bare names, and a bare-match
    rule would measure that habit. `score` holds `exact_match`, `f1`, `contains`, and, where
    passages were put in the prompt and gold ones are known, `recall_at_k` and `mrr` (the reciprocal
    rank). Raises `ValueError` if the prediction has no accepted answers.
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
