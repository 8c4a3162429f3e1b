"""Means and differences of arms that ran with several seeds, on questions that belong to subjects.

Questions about one subject are learned or missed together, and so are the answers of one training.
So nothing here treats questions as independent draws: intervals resample whole subjects and whole
seeds, and tests flip the signs of whole subjects.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy import special

from kafjax.core.records import Prediction
from kafjax.evaluation.intervals import (
    ALPHA,
    CONFIDENCE,
    MARGIN,
    RESAMPLES,
    Interval,
    holm,
    paired_bounds,
    sign_flip,
    wilson,
)

POWER = 0.8
FEW = 6
"""Subjects below which nothing can be shown: the signs of 5 flip in 32 ways, so no p-value is below
1/16, and a bootstrap has too few ways to draw them."""
_SEED = 0


@dataclasses.dataclass(frozen=True)
class Cells:
    """Scores of one arm by seed and subject.

    Attributes:
      seeds, subjects: names of the S rows and C columns. A subject that two seeds ask different
        questions about is two subjects.
      sum_SxC, count_SxC: sum of scores in [0, 1], and number of questions.
      asked: the questions of each seed, by which arms are paired.
    """

    seeds: tuple[int, ...]
    subjects: tuple[str, ...]
    sum_SxC: np.ndarray
    count_SxC: np.ndarray
    asked: tuple[frozenset[tuple[str, str]], ...]

    @property
    def n_questions(self) -> int:
        return len(frozenset().union(*self.asked))


@dataclasses.dataclass(frozen=True)
class Difference:
    """Arm `a` minus arm `b` on the same seeds and questions.

    Attributes:
      difference: its mean with the 95% interval, over seeds and subjects. `n` counts subjects.
      p_value: of the sign-flip test over subjects, seeds as they are; `p_holm` after Holm's
        correction.
      smallest: the smallest true difference that a study of this size finds with a power of 80%.
      inner: the 90% interval, whose bounds are those of two one-sided tests at 5%; None where there
        is too little data for one.
      verdict: `greater`, `less`, `equivalent` (the 90% interval lies within the margin: two
        one-sided tests) or `undecided`.
    """

    difference: Interval
    p_value: float
    p_holm: float
    smallest: float | None
    inner: tuple[float, float] | None
    verdict: str


def subject_of(prediction: Prediction) -> str:
    """Names what a question is about: its subject, else its gold passages, else the question
    alone."""
    return prediction.subject or " ".join(prediction.gold_passages) or prediction.id


def is_correct(prediction: Prediction) -> float:
    """Scores 1 for a correct answer."""
    return float(prediction.correct)


def cells(
    trials: Mapping[int, Sequence[Prediction]],
    measure: Callable[[Prediction], float] = is_correct,
) -> Cells:
    """Sums a score in [0, 1] of the answers of an arm's seeds by subject: correct ones."""
    seeds = tuple(sorted(trials))
    texts: dict[str, set[str]] = {}
    for seed in seeds:
        for p in trials[seed]:
            texts.setdefault(p.id, set()).add(p.question)
    # a corpus made from the seed asks other things under the same ids
    crossed = all(len(asked) == 1 for asked in texts.values())
    columns: dict[str, int] = {}
    entries = []
    for row, seed in enumerate(seeds):
        for p in trials[seed]:
            name = subject_of(p) if crossed else f"{seed}/{subject_of(p)}"
            entries.append((row, columns.setdefault(name, len(columns)), measure(p)))
    sum_SxC, count_SxC = np.zeros((len(seeds), len(columns))), np.zeros((len(seeds), len(columns)))
    for row, column, score in entries:
        sum_SxC[row, column] += score
        count_SxC[row, column] += 1
    asked = tuple(frozenset((p.id, p.question) for p in trials[seed]) for seed in seeds)
    return Cells(seeds, tuple(columns), sum_SxC, count_SxC, asked)


def one_seed(values: Sequence[float], subjects: Sequence[str]) -> Cells:
    """Sums values of one run by subject. Raises `ValueError` for another number of subjects than of
    values."""
    if len(values) != len(subjects):
        raise ValueError(f"{len(values)} values for {len(subjects)} subjects; give one for each")
    columns = {subject: i for i, subject in enumerate(dict.fromkeys(subjects))}
    sum_SxC, count_SxC = np.zeros((1, len(columns))), np.zeros((1, len(columns)))
    for value, subject in zip(values, subjects, strict=True):
        sum_SxC[0, columns[subject]] += value
        count_SxC[0, columns[subject]] += 1
    return Cells(
        (0,),
        tuple(columns),
        sum_SxC,
        count_SxC,
        (frozenset((str(i), subject) for i, subject in enumerate(subjects)),),
    )


def mean(arm: Cells) -> Interval:
    """Mean score over all seeds and questions, with the 95% interval over seeds and subjects; `n`
    counts subjects.

    One seed and one question a subject: Wilson's interval. Fewer than `FEW` subjects, or subjects
    that all have the same score: Wilson's for that many subjects, which errs to the wide side, since
    a bootstrap would see little variance or none. Else a bootstrap that draws
    seeds and subjects anew (Owen 2007, "The pigeonhole bootstrap"), with percentiles beyond 2.5 and
    97.5 where subjects are few (`_tail`). One subject alone has no interval. With two or three seeds it says little about the variance between
    seeds.
    """
    total, n, C = float(arm.sum_SxC.sum()), float(arm.count_SxC.sum()), len(arm.subjects)
    if n == 0:
        return Interval(None, None, None, 0)
    value = total / n
    asked = arm.count_SxC > 0
    # else a count, of tokens for instance
    is_score = bool(((arm.sum_SxC >= 0) & (arm.sum_SxC <= arm.count_SxC))[asked].all())
    alike = float(np.ptp(arm.sum_SxC[asked] / arm.count_SxC[asked])) == 0
    once = len(arm.seeds) == 1 and arm.count_SxC.max() == 1
    if is_score and (value in (0.0, 1.0) or once or (C > 1 and (alike or C < FEW))):
        return dataclasses.replace(wilson(value * C, C), value=value)
    if C == 1:
        return Interval(value, None, None, 1)
    means_K, tail = _resampled(arm.sum_SxC, arm.count_SxC), _tail(1 - CONFIDENCE, C)
    low, high = np.quantile(means_K, [tail, 1 - tail])
    return Interval(value, float(low), float(high), C)


def mean_of_questions(predictions: Sequence[Prediction], values: Sequence[float]) -> Interval:
    """Mean of a value of each question of one run, with the interval over subjects; `n` counts
    questions."""
    found = mean(one_seed(values, [subject_of(p) for p in predictions]))
    return dataclasses.replace(found, n=len(values), subjects=found.n)


def compare(
    pairs: Sequence[tuple[Cells, Cells]], *, margin: float = MARGIN, alpha: float = ALPHA
) -> list[Difference]:
    """Compares each pair of arms; Holm's correction is over all of them.

    Raises:
      ValueError: two arms share no seed, or were asked different questions.
    """
    found = [_difference(a, b) for a, b in pairs]
    adjusted = holm([p_value for _, p_value, _, _ in found])
    compared = []
    for (interval, p_value, smallest, inner), p_holm in zip(found, adjusted, strict=True):
        if p_holm < alpha:
            verdict = "greater" if (interval.value or 0.0) > 0 else "less"
        else:
            verdict = (
                "equivalent"
                if inner is not None and -margin < inner[0] and inner[1] < margin
                else "undecided"
            )
        compared.append(Difference(interval, p_value, p_holm, smallest, inner, verdict))
    return compared


def groups(arms: Sequence[Cells], *, alpha: float = ALPHA) -> list[str]:
    """Gives letters to arms: two that share one cannot be separated (sign-flip tests of all pairs,
    Holm). `a` holds the best arm.

    A letter covers neighbours in the order of means, none of which differs from another.
    """
    order = sorted(range(len(arms)), key=lambda index: -(mean_of(arms[index]) or 0.0))
    pairs = list(itertools.combinations(range(len(order)), 2))
    compared = compare([(arms[order[i]], arms[order[j]]) for i, j in pairs], alpha=alpha)
    differ = {pair for pair, one in zip(pairs, compared, strict=True) if one.p_holm < alpha}
    spans: list[tuple[int, int]] = []
    for first in range(len(order)):
        last = first
        while last + 1 < len(order) and all(
            (i, last + 1) not in differ for i in range(first, last + 1)
        ):
            last += 1
        if not spans or last > spans[-1][1]:
            spans.append((first, last))
    letters = [""] * len(arms)
    for number, (first, last) in enumerate(spans):
        for place in range(first, last + 1):
            letters[order[place]] += _letter(number)
    return letters


def mean_of(arm: Cells) -> float | None:
    """Mean score without an interval."""
    n = arm.count_SxC.sum()
    return float(arm.sum_SxC.sum() / n) if n else None


def t_interval(values: Sequence[float]) -> Interval:
    """Mean of a number that each seed has one of, with Student's 95% interval. One value alone has
    no interval."""
    values_N = np.asarray(values, float)
    n = values_N.size
    if n == 0:
        return Interval(None, None, None, 0)
    value = float(values_N.mean())
    if n == 1:
        return Interval(value, None, None, 1)
    half = float(special.stdtrit(n - 1, 0.5 + CONFIDENCE / 2) * values_N.std(ddof=1) / math.sqrt(n))
    return Interval(value, value - half, value + half, n)


def _difference(
    a: Cells, b: Cells
) -> tuple[Interval, float, float | None, tuple[float, float] | None]:
    """Returns the difference with its interval, the p-value, the smallest difference to be found,
    and the 90% interval."""
    shared = [seed for seed in a.seeds if seed in b.seeds]
    if not shared:
        raise ValueError("a paired comparison needs arms that share a seed")
    rows_a, rows_b = (
        [a.seeds.index(seed) for seed in shared],
        [b.seeds.index(seed) for seed in shared],
    )
    if any(a.asked[i] != b.asked[j] for i, j in zip(rows_a, rows_b, strict=True)):
        raise ValueError("a paired comparison needs arms that were asked the same questions")
    columns_b = (
        [b.subjects.index(name) for name in a.subjects]
        if set(a.subjects) <= set(b.subjects)
        else None
    )
    if columns_b is None:
        raise ValueError(
            "a paired comparison needs arms whose questions are about the same subjects"
        )
    difference_SxC = a.sum_SxC[rows_a] - b.sum_SxC[rows_b][:, columns_b]
    count_SxC = a.count_SxC[rows_a]
    kept = count_SxC.sum(0) > 0
    difference_SxC, count_SxC = difference_SxC[:, kept], count_SxC[:, kept]
    if not kept.any():
        return Interval(None, None, None, 0), 1.0, None, None
    value, C = float(difference_SxC.sum() / count_SxC.sum()), int(kept.sum())
    p_value = sign_flip(difference_SxC.sum(0))
    if C == 1:
        return Interval(value, None, None, 1), p_value, None, None
    if C < FEW:
        by_subject_C = difference_SxC.sum(0) / count_SxC.sum(0)
        (low, high), inner = (
            paired_bounds(by_subject_C, confidence) for confidence in (CONFIDENCE, 0.9)
        )
        return Interval(value, min(low, value), max(high, value), C), p_value, None, inner
    means_K = _resampled(difference_SxC, count_SxC)
    spread = float(means_K.std())
    # no variance was seen, which is no proof that there is none: so many subjects may differ unseen
    if spread == 0:
        unseen, inner = (1 - tail ** (1 / C) for tail in (0.025, 0.05))
        within = Interval(value, max(value - unseen, -1.0), min(value + unseen, 1.0), C)
        return within, p_value, None, (value - inner, value + inner)
    outer, inner = _tail(1 - CONFIDENCE, C), _tail(2 * (1 - CONFIDENCE), C)
    low, inner_low, inner_high, high = map(
        float, np.quantile(means_K, [outer, inner, 1 - inner, 1 - outer])
    )
    reach = float(special.stdtrit(C - 1, 0.5 + CONFIDENCE / 2) + special.stdtrit(C - 1, POWER))
    smallest = reach * spread * math.sqrt(C / (C - 1))
    return Interval(value, low, high, C), p_value, smallest, (inner_low, inner_high)


def _tail(alpha: float, C: int) -> float:
    """Returns the share of resamples beyond each bound of a two-sided interval of level `alpha`.

    Percentiles are too narrow for few subjects: they lack the factor C / (C - 1) of the variance
    and Student's tails. The expanded ones (Hesterberg 2015, "What teachers should know about the
    bootstrap", section 5.3) make up for both, and are `alpha / 2` for many.
    """
    reach = math.sqrt(C / (C - 1)) * special.stdtrit(C - 1, 1 - alpha / 2)
    return float(special.ndtr(-reach))


def _resampled(sum_SxC: np.ndarray, count_SxC: np.ndarray) -> np.ndarray:
    """Means over seeds and subjects that are drawn anew with replacement, [K]."""
    weights_KxS, weights_KxC = _draws(*sum_SxC.shape)
    sums_K = ((weights_KxS @ sum_SxC) * weights_KxC).sum(1)
    counts_K = ((weights_KxS @ count_SxC) * weights_KxC).sum(1)
    return sums_K[counts_K > 0] / counts_K[counts_K > 0]


@functools.lru_cache(maxsize=2)  # comparisons of one table draw the same subjects
def _draws(S: int, C: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts of each seed [K, S] and of each subject [K, C] in the resamples."""
    rng = np.random.default_rng(_SEED)
    weights_KxS, weights_KxC = (
        rng.multinomial(size, np.full(size, 1 / size), RESAMPLES).astype(float) for size in (S, C)
    )
    return weights_KxS, weights_KxC


def _letter(number: int) -> str:
    return chr(ord("a") + number) if number < 26 else f"({number + 1})"
