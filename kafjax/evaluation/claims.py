"""Claims that can fail: inequalities between arms, each judged `shown`, `not shown` or
`contradicted`.

    claims = (
        greater("RAG answers more than LoRA", lambda a: (cells(a, "rag"), cells(a, "lora"))),
        equal("ranks 4 and 8 are equal", lambda a: (cells(a, "r4"), cells(a, "r8")), margin=0.05),
        between("the best rates' ratio is 4 to 25", best_rates_ratio, 4, 25),
    )
    verdicts = judge(claims, arms)

A claim says where a number lies, and its interval decides. Differences of two arms are paired by
question and seed, with Holm's correction over all of a card's claims that need a test. Other
numbers bring an interval of their own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from kafjax.evaluation import clustered, table
from kafjax.evaluation.arms import Arm
from kafjax.evaluation.clustered import Cells, Difference
from kafjax.evaluation.intervals import ALPHA, Interval

SHOWN, NOT_SHOWN, CONTRADICTED = "shown", "not shown", "contradicted"
Pair = tuple[Cells, Cells]
Arms = Sequence[Arm]


@dataclasses.dataclass(frozen=True)
class Claim:
    """A number that lies between two bounds.

    Attributes:
      text: the claim in words.
      measured: reads the number off the arms: two arms' scores, whose difference it is, or a number
        with its 95% interval.
      low, high: bounds, in the number's own unit.
      strict: the claim is one of a difference from zero, and needs the sign-flip test as well.
    """

    text: str
    measured: Callable[[Arms], Pair | Interval]
    low: float
    high: float
    strict: bool = False


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Outcome of a claim.

    Attributes:
      interval: the number with its 95% interval.
      p_holm: of the sign-flip test over subjects, after Holm's correction; None for a number that
        is no difference of two arms.
      how: `shown`, `not shown` or `contradicted`.
    """

    claim: Claim
    interval: Interval
    p_holm: float | None
    how: str


def greater(text: str, measured: Callable[[Arms], Pair | Interval]) -> Claim:
    """The first of two arms scores higher. Shown by the sign-flip test over subjects."""
    return Claim(text, measured, 0.0, math.inf, strict=True)


def at_least(text: str, measured: Callable[[Arms], Pair], margin: float) -> Claim:
    """The first of two arms scores at most `margin` lower: a one-sided test at 5%."""
    return Claim(text, measured, 0.0 - margin, math.inf)


def equal(text: str, measured: Callable[[Arms], Pair], margin: float) -> Claim:
    """Two arms differ by less than `margin`: two one-sided tests at 5%."""
    return Claim(text, measured, -margin, margin)


def between(
    text: str, measured: Callable[[Arms], Interval], low: float, high: float = math.inf
) -> Claim:
    """A number's 95% interval lies between two bounds, either of which may be infinite."""
    return Claim(text, measured, low, high)


def judge(claims: Sequence[Claim], arms: Arms) -> list[Verdict]:
    """Judges each claim. A number that cannot be measured shows nothing."""
    measured = [claim.measured(arms) for claim in claims]
    pairs = [one for one in measured if isinstance(one, tuple)]
    differences = iter(clustered.compare(pairs))
    return [
        _of_difference(claim, next(differences))
        if isinstance(one, tuple)
        else Verdict(claim, one, None, _place((one.low, one.high), claim))
        for claim, one in zip(claims, measured, strict=True)
    ]


def _of_difference(claim: Claim, found: Difference) -> Verdict:
    bounds = (found.difference.low, found.difference.high) if claim.strict else found.inner
    how = NOT_SHOWN if bounds is None else _place(bounds, claim)
    if claim.strict and found.p_holm >= ALPHA:
        how = NOT_SHOWN
    return Verdict(claim, found.difference, found.p_holm, how)


def _place(bounds: tuple[float | None, float | None], claim: Claim) -> str:
    """Places an interval: inside the claim's bounds, outside of them, or across one."""
    low, high = bounds
    if low is None or high is None:
        return NOT_SHOWN
    if high < claim.low or low > claim.high or (claim.strict and high == claim.low):
        return CONTRADICTED
    inside = low > claim.low if claim.strict else low >= claim.low
    return SHOWN if inside and high <= claim.high else NOT_SHOWN


def verdict_table(verdicts: Sequence[Verdict]) -> table.Table:
    """A row a claim: what was measured, what it needs, the corrected p-value and the verdict."""
    rows = tuple(
        (
            one.claim.text,
            table.ratio(one.interval.to_json()),
            _needed(one.claim),
            table.NONE if one.p_holm is None else f"{one.p_holm:.3f}",
            one.how,
        )
        for one in verdicts
    )
    notes = (
        "Measured [95% interval]: differences of two arms in shares of questions, paired by question "
        "and seed, over subjects and seeds; other numbers as the claim says. p: sign-flip test over "
        f"subjects, Holm's correction over the {sum(one.p_holm is not None for one in verdicts)} "
        "differences of this table. A difference from zero is shown by the test, one within a margin "
        "by the 90% interval (one-sided tests at 5%). Contradicted: the interval lies outside.",
    )
    return table.Table("Verdicts", ("claim", "measured", "needed", "p", "verdict"), rows, notes)


def _needed(claim: Claim) -> str:
    if claim.low == -math.inf:
        return f"at most {claim.high:.3g}"
    if claim.high == math.inf:
        return f"above {claim.low:g}" if claim.strict else f"at least {claim.low:.3g}"
    return f"{claim.low:.3g} to {claim.high:.3g}"
